"""h2load (C, Debian's nghttp2-client), which sends one body again and again over gRPC."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

from bench.servers import Server
from etcdlite import methods


def message(body: bytes) -> bytes:
    """A message of gRPC: without compression, with its length."""
    return b"\0" + len(body).to_bytes(4, "big") + body


def h2load(
    server: Server,
    method_name: str,
    content: bytes,
    requests: int,
    split: tuple[int, int],
    folder: str,
    options: Sequence[str] = (),
) -> float:
    """Requests per second that h2load counts. Raises SystemExit on any failed request. `content`:
    what each one sends. `split`: connections, and streams of each. `options`: further ones of
    h2load."""
    path = os.path.join(folder, "body")
    with open(path, "wb") as file:
        file.write(content)
    connections, streams = split
    output = subprocess.run(
        [
            "h2load",
            f"--requests={requests}",
            f"--clients={connections}",
            f"--max-concurrent-streams={streams}",
            f"--data={path}",
            "--npn-list=h2",  # Over TLS it offers HTTP/1.1, too.
            "--header=te: trailers",
            "--header=content-type: application/grpc",
            *options,
            f"{server.scheme}://127.0.0.1:{server.port}{methods.METHOD_BY_NAME[method_name].grpc_path}",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rate = re.search(r"finished in .*, ([\d.]+) req/s", output)
    if rate is None or f"{requests} succeeded, 0 failed, 0 errored, 0 timeout" not in output:
        raise SystemExit(f"bench: h2load failed:\n{output}")
    return float(rate[1])


def h2load_timed(
    server: Server,
    method_name: str,
    content: bytes,
    requests: int,
    split: tuple[int, int],
    folder: str,
    token: str = "",
) -> tuple[float, list[int]]:
    """As `h2load`, and the latencies of all requests in microseconds, sorted. `token` says for
    which user they are."""
    log_path = os.path.join(folder, "latencies")
    options = [f"--log-file={log_path}", *([f"--header=token: {token}"] if token else [])]
    if os.path.exists(log_path):
        os.unlink(log_path)
    rate = h2load(server, method_name, content, requests, split, folder, options)
    with open(log_path) as file:
        latencies = sorted(int(line.split()[2]) for line in file)
    os.unlink(log_path)
    return rate, latencies
