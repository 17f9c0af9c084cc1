"""etcd's own load generator, `benchmark`: real Go clients, built from Debian's sources.

`tool` returns the program that `ETCD_BENCHMARK` names, or the one built before, or builds it. It
needs root, `mmdebstrap`, a network with Debian's packages, and two to ten minutes and 5 GB: Debian
13 is installed into a folder, with Go and what its package `etcd` needs to be built; the tool is
built there and copied out, and the folder is removed.

Where that is not possible `tool` returns None, and `go_client.py` takes its place: the same
arguments, and the same traffic (one connection per client, a PING and a WINDOW_UPDATE after
answers). It is Python, so it costs more than the real one.

    python -m bench.etcd_benchmark     builds it and prints its path
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BUILT = Path(__file__).resolve().parent.parent / "build" / "etcd-benchmark"
MIRROR = "http://deb.debian.org/debian"
SUITE = "trixie"

_BUILD = r"""
set -e
mkdir /src /go; cd /src; apt-get source -q etcd; S=$(echo /src/etcd-*/); D=/go/src/go.etcd.io/etcd
mkdir -p $D/client/pkg $D/pkg $D/server $D/raft $D/api $D/v3/tools
cp -r $S/tools/benchmark $D/v3/tools/
cp -r $S/client/v3 $D/client/v3; cp -r $S/client/pkg $D/client/pkg/v3
for module in pkg server raft api; do cp -r $S/$module $D/$module/v3; done
find $D -xtype l -delete; cd $D/v3/tools/benchmark
export GO111MODULE=off GOPATH=/go:/usr/share/gocode GOCACHE=/go/cache HOME=/tmp CGO_ENABLED=0
go build -o /benchmark .
"""


@dataclass
class Report:
    """What one run gave. Times in milliseconds."""

    per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float


def tool() -> str | None:
    """The program; None if it is not there and cannot be built."""
    named = os.environ.get("ETCD_BENCHMARK")
    if named:
        return named
    if not BUILT.exists():
        try:
            _build()
        except (OSError, subprocess.SubprocessError) as failure:
            print(f"bench: cannot build etcd's benchmark tool: {failure}", file=sys.stderr)
            return None
    return str(BUILT)


def _build() -> None:
    if os.geteuid() or shutil.which("mmdebstrap") is None:
        raise OSError("it takes root and mmdebstrap")
    with tempfile.TemporaryDirectory(prefix="etcd-benchmark-") as folder:
        root = os.path.join(folder, "root")
        hooks = (
            f'echo "deb-src {MIRROR} {SUITE} main" >> "$1/etc/apt/sources.list"',
            'chroot "$1" apt-get -q update',
            'chroot "$1" apt-get -qy --no-install-recommends install dpkg-dev golang-go',
            'chroot "$1" apt-get -qy --no-install-recommends build-dep etcd',
            # Here the folder still has /proc, which Go needs, and apt its lists.
            f'chroot "$1" sh -c {shlex.quote(_BUILD)}',
        )
        command = ["mmdebstrap", "--variant=apt", "--include=ca-certificates"]
        command += [f"--customize-hook={hook}" for hook in hooks]
        print("bench: building etcd's benchmark tool; ten minutes", file=sys.stderr)
        run = {"check": True, "stdout": subprocess.DEVNULL, "timeout": 1800}
        subprocess.run([*command, SUITE, root, MIRROR], **run)  # type: ignore[call-overload]
        BUILT.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(root, "benchmark"), BUILT)


def start(program: str | None, ports: Sequence[int], words: Sequence[str]) -> subprocess.Popen[str]:
    """Start a load, with the arguments of etcd's tool."""
    command = [program] if program else [sys.executable, "-m", "bench.go_client"]
    endpoints = ",".join(f"127.0.0.1:{port}" for port in ports)
    return subprocess.Popen(
        [*command, *words, "--precise", f"--endpoints={endpoints}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=BUILT.parent.parent,
    )


def finish(load: subprocess.Popen[str]) -> Report:
    """Wait for a load. Raises SystemExit if a request failed."""
    output, _ = load.communicate()
    found = {
        name: re.search(pattern, output)
        for name, pattern in {
            "per_s": r"Requests/sec:\s+(\S+)",
            "max": r"Slowest:\s+(\S+)",
            "p50": r"50% in (\S+)",
            "p99": r"99% in (\S+)",
        }.items()
    }
    if load.returncode or "Error distribution" in output or not found["per_s"]:
        raise SystemExit(f"bench: the load failed:\n{output[-3000:]}")
    value = {name: float(match[1]) for name, match in found.items() if match}
    # The tool prints no 99th percentile for fewer than 100 requests.
    p50_s, p99_s = value["p50"], value.get("p99", value["max"])
    return Report(value["per_s"], p50_s * 1e3, p99_s * 1e3, value["max"] * 1e3)


if __name__ == "__main__":
    print(tool())
