"""What users cost: gRPC on etcd and etcdlite with users enabled, from the same load generator.

    python -m bench.users               prints the table; takes about two minutes

h2load puts and reads one key for a user whose role allows its prefix, with a simple token: over 100
connections of 10 streams, and one request at a time. For comparison, etcdlite without users.

h2load does not look at the status of an answer. So each load is preceded by a request that must
succeed with the token, and by one that must fail without it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import tempfile
import urllib.error
import urllib.request

from bench.grpc import print_rates, unary_rates
from bench.native_load import key_of
from bench.servers import Server, etcd_binary

SETUP = (
    "role add root",
    "user add root:secret",
    "user grant-role root root",
    "role add bench",
    "role grant-permission bench readwrite {key}",
    "user add alice:secret",
    "user grant-role alice bench",
    "auth enable",
)
"""etcdctl's commands; some servers have the role root from the start."""


def post(server: Server, path: str, body: dict[str, str], token: str = "") -> dict[str, str]:
    """Raises urllib.error.HTTPError."""
    url = f"http://127.0.0.1:{server.port}/v3/{path}"
    headers = {"Authorization": token} if token else {}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))


def enable(server: Server) -> str:
    """Enable users. Returns a token of alice."""
    ctl = os.path.join(os.path.dirname(etcd_binary()), "etcdctl")
    for line in SETUP:
        words = line.format(key=key_of(0).decode()).split()
        done = subprocess.run(
            [ctl, f"--endpoints=127.0.0.1:{server.port}", *words], capture_output=True, text=True
        )
        if done.returncode and "already exists" not in done.stderr:
            raise SystemExit(f"bench: etcdctl {line}: {done.stderr}")
    token = post(server, "auth/authenticate", {"name": "alice", "password": "secret"})["token"]
    key = {"key": base64.b64encode(key_of(0)).decode()}
    post(server, "kv/put", {**key, "value": ""}, token)
    try:
        post(server, "kv/range", key)
    except urllib.error.HTTPError:
        return token
    raise SystemExit(f"bench: {server.name} serves without a token")


def measure(name: str, folder: str, has_users: bool, scale: float) -> dict[str, float]:
    """One round with one server: requests per second, and server CPU per request in µs."""
    with Server(name, folder) as server:
        return unary_rates(server, folder, scale, enable(server) if has_users else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what users cost, beside etcd.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    kinds = {
        "etcd, users": ("etcd", True),
        "etcdlite, users": ("etcdlite", True),
        "etcdlite, none": ("etcdlite", False),
    }
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="etcdlite-bench-") as folder:
        for number in range(options.rounds):
            for kind, (name, has_users) in kinds.items():
                place = os.path.join(folder, f"{number}-{kind}")
                os.mkdir(place)
                rounds[kind].append(measure(name, place, has_users, options.scale))
    print_rates(rounds, "etcdlite, users", "etcd, users")


if __name__ == "__main__":
    main()
