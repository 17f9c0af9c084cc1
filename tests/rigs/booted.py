"""Machines for `rigs.pages` that are booted Debians: containers of systemd-nspawn on a bridge.

    python -m rigs.booted --make FOLDER RELEASE DEB     makes the system that all machines boot
    unshare --net --mount --pid --fork --kill-child --mount-proc \
        python -m rigs.booted FOLDER PAGE [REPORT]      carries out one page; only root can

A machine begins as what a person has who bought it: a minimal Debian with sshd, root's key on all
machines, and the package in root's home. What the package needs lies in apt's cache, because the
machines have no network but the bridge. All boot one system, each with a layer of its own in
memory.

REPORT gets a line for each step: seconds, number of commands, place. So it is the clock of a
newcomer who types without a pause.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rigs import pages
from rigs.namespaces import NETWORK, READY, with_answers

PATIENCE_S = 180.0
PACKAGES = "systemd,systemd-sysv,dbus,iproute2,openssh-client,openssh-server,curl"
ENVIRON = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
SETTINGS = """\
set -e
mkdir -p "$1/root/.ssh" "$1/root/dist"
ssh-keygen -q -t ed25519 -N '' -f "$1/root/.ssh/id_ed25519"
cp "$1/root/.ssh/id_ed25519.pub" "$1/root/.ssh/authorized_keys"
printf 'StrictHostKeyChecking accept-new\\nLogLevel ERROR\\n' > "$1/root/.ssh/config"
printf '127.0.0.1 localhost\\n::1 localhost\\n' > "$1/etc/hosts"
printf 'APT::Get::Assume-Yes "true";\\n' > "$1/etc/apt/apt.conf.d/90yes"
cp "$2" "$1/root/etcdlite.deb"
cp "$2" "$1/root/dist/etcdlite.deb"
chroot "$1" apt-get clean
chroot "$1" apt-get install -q -o APT::Install-Recommends=true --download-only /root/etcdlite.deb
"""


def make(folder: Path, release: str, deb: Path) -> str:
    """Make the system in a new directory. Returns why that failed, or nothing."""
    script = folder.parent / f"{release}.settings"
    script.write_text(SETTINGS)
    done = subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}",
         "--skip=cleanup/apt", f"--customize-hook=sh {script} \"$1\" {deb}",
         release, folder],
        capture_output=True,
        text=True,
    )  # fmt: skip
    return "".join(done.stderr.splitlines(keepends=True)[-5:]) if done.returncode else ""


class BootedLab:
    def __init__(self, system: Path) -> None:
        self.system = system
        self._machines: dict[str, BootedMachine] = {}
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "link", "add", "br0", "type", "bridge"], check=True)
        subprocess.run(["ip", "link", "set", "br0", "up"], check=True)

    def machine(self, name: str) -> BootedMachine:
        if name not in self._machines:
            self._machines[name] = BootedMachine(self.system, name)
        return self._machines[name]

    def boot(self, names: set[str]) -> None:
        for name in sorted(names):
            self.machine(name)
        for name in sorted(names):
            self.machine(name).wait_until_booted()

    def logs(self) -> str:
        command = "journalctl -u 'etcdlite*' --no-pager -n 30; systemctl --failed --no-pager"
        return "\n".join(
            f"--- {name}:\n{machine.run(command)[1]}"
            for name, machine in self._machines.items()
            if machine.is_running
        )


class BootedMachine:
    def __init__(self, system: Path, name: str) -> None:
        self.name = name
        self._address = f"{NETWORK}.{ord(name) - ord('a') + 1}"
        self._server: subprocess.Popen[bytes] | None = None
        self._nspawn = subprocess.Popen(
            ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--machine=lab-{name}",
             "--network-bridge=br0", "--volatile=overlay", "-D", system, "--boot",
             "systemd.log_level=warning"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self._inside: list[str] = []

    @property
    def is_running(self) -> bool:
        return self._nspawn.poll() is None

    def wait_until_booted(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        while time.monotonic() < deadline_s:
            if not self.is_running:
                assert self._nspawn.stderr is not None
                raise pages.Failed(f"systemd-nspawn: {self._nspawn.stderr.read().decode()}")
            found = children.read_text().split()
            if found:
                self._inside = ["nsenter", "--target", found[0], "--mount", "--uts", "--ipc",
                                "--net", "--pid", "--root", "--wd"]  # fmt: skip
                state = self._do("systemctl is-system-running")
                if state.stdout.strip() in ("running", "degraded"):
                    break
            time.sleep(0.2)
        else:
            raise pages.Failed(f"{self.name} does not boot in {PATIENCE_S:g} s")
        done = self._do(
            f"hostname {self.name}; ip address add {self._address}/24 dev host0; "
            "ip link set host0 up; mkdir -p /run/lab"
        )
        assert done.returncode == 0, done.stderr

    def _do(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._inside, "bash", "-c", script],
            env=ENVIRON,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def _command(self, script: str) -> list[str]:
        self.write("/run/lab/block", script)
        program = (
            "set -e -o pipefail; cd; . /run/lab/state 2>/dev/null || :; . /run/lab/block; "
            '{ export -p; printf "cd %q\\n" "$PWD"; } > /run/lab/state'
        )
        return [*self._inside, "bash", "-c", program]

    def run(self, script: str, answers: tuple[str, ...] = ()) -> tuple[int, str]:
        command = self._command(script)
        if answers:
            return with_answers(command, ENVIRON, answers)
        done = subprocess.run(
            command,
            env=ENVIRON,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    def serve(self, script: str) -> None:
        self._server = subprocess.Popen(
            self._command(script),
            env=ENVIRON,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if READY.encode() in line:
                return
        raise pages.Failed("the server is not ready")

    def interrupt(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(PATIENCE_S)
            self._server = None

    def kill(self) -> None:
        self._nspawn.kill()
        self._nspawn.wait()
        # The machine's first process dies with its namespace, if not with nspawn.
        subprocess.run(["kill", "-9", self._inside[2]], check=False, capture_output=True)

    def write(self, path: str, text: str) -> None:
        subprocess.run(
            [*self._inside, "sh", "-c", f"cat > {path}"], input=text.encode(), check=True
        )


def commands_in(step: pages.Step) -> int:
    """How many commands a person types for this step, on all its machines."""
    text = step.text if step.language in pages.COMMANDS else ""
    lines = text.replace("\\\n", "").splitlines()
    if step.language == "console":
        lines = [line for line in lines if line.startswith("$ ")]
    return len(step.hosts) * sum(1 for line in lines if line.strip())


def main() -> int:
    if sys.argv[1] == "--make":
        print(failed := make(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
        return bool(failed)
    system, page = Path(sys.argv[1]), Path(sys.argv[2])
    report = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    assert shutil.which("systemd-nspawn")
    lab = BootedLab(system)
    steps = [step for step in pages.steps(page) if step.verb != "skip"]
    try:
        lab.boot({host for step in steps for host in step.hosts})
        began_s = time.monotonic()
        lines = []
        for step, line in zip(steps, pages.run(page, lab), strict=True):
            now_s = time.monotonic()
            lines.append(f"{now_s - began_s:.1f} {commands_in(step)} {line}")
            print(lines[-1], flush=True)
            began_s = now_s
        if report is not None:
            report.write_text("\n".join(lines) + "\n")
    except (pages.Failed, subprocess.TimeoutExpired) as failed:
        print(failed, lab.logs(), sep="\n", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
