"""Three members on loopback, to try a cluster: `make cluster` runs it, or
`python -m etcdlite.cli.local_cluster`.

    name   clients            members            data and log
    m1     127.0.0.1:2379     127.0.0.1:2380     ./cluster/m1, ./cluster/m1.log
    m2     127.0.0.1:22379    127.0.0.1:22380    ./cluster/m2, ./cluster/m2.log
    m3     127.0.0.1:32379    127.0.0.1:32380    ./cluster/m3, ./cluster/m3.log

The data stays, and the next start continues with it. A member that ends, for example because you
kill it to see an election, is started again after a pause, as a service manager would do. Ctrl-C,
SIGTERM and closing the terminal stop all members. They also stop when this process is killed.

It is for trying out only: a cluster on one machine survives nothing that one member would not.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from etcdlite.cli.machine import holder, listeners
from etcdlite.client import Client, EtcdliteError

MEMBERS = {"m1": (2379, 2380), "m2": (22379, 22380), "m3": (32379, 32380)}
"""Ports for clients and for members, by name."""

START_PATIENCE_S = 30.0
STOP_PATIENCE_S = 30.0
RESTART_S = 5.0
"""Pause before a member that ended is started again."""

REFUSED = 2
"""The status of a member that no restart helps, as of one that was removed: it stays down."""

LAST_LINES = 5
"""Shown from the end of the log of a member that did not start."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal to get when the parent process dies."""

USAGE = """\
Three members serve. In another terminal:

  export ETCDLITE_CTL_ENDPOINTS={endpoints}
  etcdlite-ctl put greeting hello
  etcdlite-ctl member list -w table
  etcdlite-ctl endpoint status --cluster -w table
  etcdlite-ctl endpoint health --cluster

Their logs: {folder}/m1.log, m2.log, m3.log. To see an election, kill the leader; it is started
again after {restart_s:g} seconds: {kills}.
Ctrl-C stops all; their data in {folder} stays for the next start.
"""


class NotStarted(Exception):
    """The cluster, or a member of it, did not start. The text is for the user."""


def _not_started(name: str, folder: str, what: str) -> NotStarted:
    path = f"{folder}/{name}.log"
    with open(path, errors="replace") as file:
        lines = "".join(file.readlines()[-LAST_LINES:]).rstrip()
    begin = f"To begin again without data, stop all members and remove {folder}."
    return NotStarted(f"{name} {what}; its log {path} ends with:\n{lines}\n{begin}")


def endpoints() -> list[str]:
    return [f"127.0.0.1:{client_port}" for client_port, _ in MEMBERS.values()]


def check_ports() -> None:
    """Raises NotStarted if a port is taken, with the process that has it."""
    taken = []
    for port in (port for ports in MEMBERS.values() for port in ports):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                probe.listen()
            except OSError as failure:
                process = holder(listeners(port))
                taken.append(f"port {port} is taken by {process} ({failure.strerror})")
    if taken:
        raise NotStarted("\n".join([*taken, "Stop what uses these ports, and start again."]))


def _end_with(parent: int) -> None:
    """In a new member: end when the parent process does. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def start_member(name: str, folder: str) -> subprocess.Popen[bytes]:
    client_port, peer_port = MEMBERS[name]
    client_url, peer_url = (f"http://127.0.0.1:{port}" for port in (client_port, peer_port))
    cluster = ",".join(f"{m}=http://127.0.0.1:{port}" for m, (_, port) in MEMBERS.items())
    # Variables for another server must not have an effect here.
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
                f"--initial-cluster={cluster}",
                "--initial-cluster-token=local",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            # Ctrl-C is for this process, which stops the members.
            start_new_session=True,
            preexec_fn=functools.partial(_end_with, os.getpid()),
        )


def wait_until_all_serve(members: dict[str, subprocess.Popen[bytes]], folder: str) -> None:
    """Raises NotStarted."""
    deadline = time.monotonic() + START_PATIENCE_S
    waiting = dict(zip(members, endpoints(), strict=True))
    while waiting:
        for name, endpoint in list(waiting.items()):
            if members[name].poll() is not None:
                raise _not_started(name, folder, "ended")
            with contextlib.suppress(EtcdliteError), Client(endpoint, timeout_s=1.0) as client:
                client.get("a read that needs a leader")
                if any(member.name == name for member in client.members()):  # It is published.
                    del waiting[name]
        if time.monotonic() > deadline:
            raise _not_started(next(iter(waiting)), folder, "does not serve")
        time.sleep(0.1)


def keep_running(members: dict[str, subprocess.Popen[bytes]], folder: str) -> None:
    """Restart members that end, until a signal. Raises NotStarted once none stays up."""
    ended_s: dict[str, float] = {}
    while True:
        for name, member in members.items():
            now_s = time.monotonic()
            if member.poll() is None:
                continue
            if name not in ended_s:
                ended_s[name] = now_s
                print(f"{name} ended with status {member.returncode}", flush=True)
                if member.returncode == REFUSED:
                    failure = _not_started(name, folder, "is not started again")
                    ended_s[name] = math.inf
                    if all(ended_s.get(other) == math.inf for other in members):
                        raise failure
                    print(failure, flush=True)
            elif now_s - ended_s[name] > RESTART_S:
                del ended_s[name]
                members[name] = start_member(name, folder)
                print(f"{name} was started again: pid {members[name].pid}", flush=True)
        time.sleep(0.2)


def stop(members: dict[str, subprocess.Popen[bytes]]) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    for member in members.values():
        if member.poll() is None:
            member.terminate()
    deadline = time.monotonic() + STOP_PATIENCE_S
    for name, member in members.items():
        try:
            member.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            member.kill()
            member.wait()
            with contextlib.suppress(OSError):
                print(f"{name} did not stop; killed it", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 stopped as asked, 1 a member did not start."""
    parser = argparse.ArgumentParser(
        prog="python -m etcdlite.cli.local_cluster", description="Start three members on loopback."
    )
    parser.add_argument("folder", nargs="?", default="cluster", help="for data and logs [cluster]")
    folder = parser.parse_args(argv).folder
    os.makedirs(folder, exist_ok=True)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    members: dict[str, subprocess.Popen[bytes]] = {}
    try:
        check_ports()
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
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # The terminal may be gone.
            print("\nstopping the members", flush=True)
    finally:
        stop(members)
    return 0


if __name__ == "__main__":
    sys.exit(main())
