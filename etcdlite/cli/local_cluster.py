"""Three members on loopback, to try a cluster: `make cluster` runs it, or
`python -m etcdlite.cli.local_cluster`.

    name   clients            members            data and log
    m1     127.0.0.1:2379     127.0.0.1:2380     ./cluster/m1, ./cluster/m1.log
    m2     127.0.0.1:22379    127.0.0.1:22380    ./cluster/m2, ./cluster/m2.log
    m3     127.0.0.1:32379    127.0.0.1:32380    ./cluster/m3, ./cluster/m3.log

The data stays; the next start goes on with it. A member that ends, by a kill to see what the others
do, is started again after a while, as a service manager would. Ctrl-C or SIGTERM stops all.

It is for trying out only: a cluster on one machine survives nothing that one member would not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from etcdlite.client import Client, EtcdliteError

MEMBERS = {"m1": (2379, 2380), "m2": (22379, 22380), "m3": (32379, 32380)}
"""Ports for clients and for members, by name."""

START_PATIENCE_S = 30.0
STOP_PATIENCE_S = 30.0
RESTART_S = 5.0
"""How long a member that ended stays away."""

LAST_LINES = 5
"""Of the log of a member that did not start, what is shown."""

USAGE = """\
Three members serve. In another terminal:

  export ETCDLITE_CTL_ENDPOINTS={endpoints}
  etcdlite-ctl put greeting hello
  etcdlite-ctl member list -w table
  etcdlite-ctl endpoint status --cluster -w table
  etcdlite-ctl endpoint health --cluster

Their logs: {folder}/m1.log, m2.log, m3.log. To see an election, kill the leader; it is back after
{restart_s:g} seconds: {kills}.
Ctrl-C stops all; their data in {folder} stays for the next time.
"""


class NotStarted(Exception):
    """A member did not start; the text ends with the end of its log."""

    def __init__(self, name: str, folder: str, what: str) -> None:
        path = f"{folder}/{name}.log"
        with open(path, errors="replace") as file:
            lines = "".join(file.readlines()[-LAST_LINES:])
        super().__init__(f"{name} {what}; its log {path} ends with:\n{lines}")


def endpoints() -> list[str]:
    return [f"127.0.0.1:{client_port}" for client_port, _ in MEMBERS.values()]


def start_member(name: str, folder: str) -> subprocess.Popen[bytes]:
    client_port, peer_port = MEMBERS[name]
    client_url, peer_url = (f"http://127.0.0.1:{port}" for port in (client_port, peer_port))
    cluster = ",".join(f"{m}=http://127.0.0.1:{port}" for m, (_, port) in MEMBERS.items())
    # What is set for another server does not count here.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("ETCD_", "ETCDLITE_"))}
    with open(f"{folder}/{name}.log", "ab") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "etcdlite",
                "--config-file=/dev/null",
                f"--name={name}",
                f"--data-dir={folder}/{name}",
                f"--listen-client-urls={client_url}",
                f"--listen-peer-urls={peer_url}",
                f"--initial-advertise-peer-urls={peer_url}",
                f"--initial-cluster={cluster}",
                "--initial-cluster-token=local",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            # Ctrl-C is for this process, which stops the members.
            start_new_session=True,
        )


def wait_until_all_serve(members: dict[str, subprocess.Popen[bytes]], folder: str) -> None:
    """Raises NotStarted."""
    deadline = time.monotonic() + START_PATIENCE_S
    waiting = dict(zip(members, endpoints(), strict=True))
    while waiting:
        for name, endpoint in list(waiting.items()):
            if members[name].poll() is not None:
                raise NotStarted(name, folder, "ended")
            with contextlib.suppress(EtcdliteError), Client(endpoint, timeout_s=1.0) as client:
                client.get("a read that needs a leader")
                del waiting[name]
        if time.monotonic() > deadline:
            raise NotStarted(next(iter(waiting)), folder, "does not serve")
        time.sleep(0.1)


def keep_running(members: dict[str, subprocess.Popen[bytes]], folder: str) -> None:
    """Start members again that end; forever."""
    ended: dict[str, float] = {}
    while True:
        for name, member in members.items():
            if member.poll() is None:
                continue
            if name not in ended:
                ended[name] = time.monotonic()
                print(f"{name} ended with status {member.returncode}", flush=True)
            elif time.monotonic() - ended[name] > RESTART_S:
                del ended[name]
                members[name] = start_member(name, folder)
                print(f"{name} was started again: pid {members[name].pid}", flush=True)
        time.sleep(0.2)


def stop(members: dict[str, subprocess.Popen[bytes]]) -> None:
    # They were told already if the signal went to the whole process group; once is enough here too.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    for member in members.values():
        if member.poll() is None:
            member.terminate()
    deadline = time.monotonic() + STOP_PATIENCE_S
    for name, member in members.items():
        try:
            member.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{name} does not stop; killing it", file=sys.stderr)
            member.kill()
            member.wait()


def _terminated(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 stopped as asked, 1 a member did not start."""
    parser = argparse.ArgumentParser(
        prog="python -m etcdlite.cli.local_cluster", description="Start three members on loopback."
    )
    parser.add_argument("folder", nargs="?", default="cluster", help="for data and logs [cluster]")
    folder = parser.parse_args(argv).folder
    os.makedirs(folder, exist_ok=True)
    signal.signal(signal.SIGTERM, _terminated)
    members: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in MEMBERS:
            members[name] = start_member(name, folder)
        wait_until_all_serve(members, folder)
        print(
            USAGE.format(
                endpoints=",".join(endpoints()),
                folder=folder,
                kills=", ".join(f"kill -9 {member.pid} ({n})" for n, member in members.items()),
                restart_s=RESTART_S,
            ),
            flush=True,
        )
        keep_running(members, folder)
    except NotStarted as failure:
        print(failure, file=sys.stderr, end="")
        return 1
    except KeyboardInterrupt:
        print("\nstopping the members", flush=True)
    finally:
        stop(members)
    return 0


if __name__ == "__main__":
    sys.exit(main())
