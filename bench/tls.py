"""What TLS costs: gRPC over TLS on etcd and etcdlite from the same load generator, and handshakes.

    python -m bench.tls                 prints both tables; takes about two minutes

h2load does the same on both servers, over the same certificate (ECDSA P-256): puts and ranges over
100 connections of 10 streams, and by one client, one at a time. For comparison, the same without
TLS. The table of handshakes is the CPU time of the server's side alone, of the whole handshake and
of its longest step; a thread takes these steps.
"""

from __future__ import annotations

import argparse
import os
import ssl
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench.grpc import print_rates, unary_rates
from bench.servers import Server
from etcdlite import certificates

KEYS = {
    "ECDSA P-256": ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
    "RSA 2048": ("rsa:2048",),
    "RSA 4096": ("rsa:4096",),
}


def measure(
    name: str, folder: str, cert: certificates.Pair | None, scale: float
) -> dict[str, float]:
    """One round with one server: requests per second, and server CPU per request in µs."""
    with Server(name, folder, cert) as server:
        return unary_rates(server, folder, scale)


def handshake_ms(cert: str, key: str, is_mutual: bool, rounds: int = 50) -> tuple[float, float]:
    """CPU of the server's side: of all steps, and of the longest one. Medians."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cert)
    client.check_hostname = False
    if is_mutual:
        server.load_verify_locations(cert)
        server.verify_mode = ssl.CERT_REQUIRED
        client.load_cert_chain(cert, key)
    found = []
    for _ in range(rounds):
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        near, far = client.wrap_bio(back, there), server.wrap_bio(there, back, True)
        steps: list[float] = []
        is_done = False
        while not is_done:
            for one in (near, far):
                began = time.thread_time()
                try:
                    one.do_handshake()
                    is_done = one is far
                except ssl.SSLWantReadError:
                    pass
                if one is far:
                    steps.append(time.thread_time() - began)
        found.append((sum(steps) * 1000, max(steps) * 1000))
    whole, longest = zip(*found, strict=True)
    return statistics.median(whole), statistics.median(longest)


def handshakes(folder: str) -> None:
    print("| key of the certificate | handshake | longest step | with a client's | longest step |")
    print("|---|---|---|---|---|")
    for kind, arguments in KEYS.items():
        cert, key = os.path.join(folder, "h.pem"), os.path.join(folder, "h-key.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", *arguments, "-nodes", "-keyout", key,
             "-out", cert, "-days", "1", "-subj", "/CN=bench"],
            check=True, capture_output=True,
        )  # fmt: skip
        cells = (*handshake_ms(cert, key, False), *handshake_ms(cert, key, True))
        print(f"| {kind} | " + " | ".join(f"{cell:.2f} ms" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what TLS costs, beside etcd.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="etcdlite-bench-") as folder:
        handshakes(folder)
        now = int(time.time())
        made = certificates.make(
            certificates.Profile("server", "bench", ("127.0.0.1",), now - 60, now + 86400)
        )
        cert = certificates.Pair(os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem"))
        for path, text in zip(cert, made, strict=True):
            Path(path).write_text(text)
        kinds = {
            "etcd, TLS": ("etcd", cert),
            "etcdlite, TLS": ("etcdlite", cert),
            "etcdlite, plain": ("etcdlite", None),
        }
        rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, (name, used) in kinds.items():
                rounds[kind].append(measure(name, folder, used, options.scale))
    print()
    print_rates(rounds, "etcdlite, TLS", "etcd, TLS")


if __name__ == "__main__":
    main()
