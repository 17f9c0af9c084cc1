"""What encryption at rest costs: puts, ranges, restart and backup of one member with and without.

    python -m bench.encryption               a million keys, about five minutes
    python -m bench.encryption --keys 100000

Rounds alternate between a plain member and one with `encryption-key-file`. CPU is that of the
server, which other load on the machine disturbs less than it does the times.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time

from bench.clients import call, connect
from bench.native_load import key_of
from bench.scale import load, seconds_until_first_read
from bench.servers import Server
from etcdlite import proto, sealing
from etcdlite.client import Client

KEYS = "ETCDLITE_ENCRYPTION_KEY_FILE"
COLD_READS = 20_000

ROWS = {
    "load_s": "load, 1,000 puts in flight, s",
    "put_cpu_us": "server CPU per put, µs",
    "one_put_us": "put latency, one in flight, median, µs",
    "disk_mib": "data directory, MiB",
    "restart_s": "kill -9, start, first linearizable read, s",
    "restart_cpu_s": "of it CPU, s",
    "cold_read_us": "server CPU per range of one key that is not in memory, µs",
    "all_s": "ranges over all keys, 10,000 at a time, s",
    "all_cpu_s": "of it server CPU, s",
    "backup_s": "backup, s",
    "backup_cpu_s": "of it server CPU, s",
    "rss_mib": "RSS, MiB",
}


def one_round(folder: str, keys: int) -> dict[str, float]:
    found: dict[str, float] = {}
    with Server("etcdlite", folder) as server:
        began, cpu = time.monotonic(), server.cpu_s()
        load(server, range(keys))
        found["load_s"] = time.monotonic() - began
        found["put_cpu_us"] = (server.cpu_s() - cpu) / keys * 1e6
        connection = connect("etcdlite", server.port)
        latencies = []
        for number in range(500):
            began = time.monotonic()
            request = proto.PutRequest(key=key_of(number), value=bytes(256))
            call(connection, "KV.Put", request)
            latencies.append(time.monotonic() - began)
        found["one_put_us"] = statistics.median(latencies) * 1e6
        found["disk_mib"] = server.disk_bytes() / 2**20
        server.kill()
        found["restart_s"] = seconds_until_first_read(server, key_of(0))
        found["restart_cpu_s"] = server.cpu_s()
        found["rss_mib"] = server.memory_kib()["VmRSS"] / 1024
        connection = connect("etcdlite", server.port)
        rng, cpu = random.Random(1), server.cpu_s()
        for _ in range(COLD_READS):
            request = proto.RangeRequest(key=key_of(rng.randrange(keys)), serializable=True)
            assert call(connection, "KV.Range", request).count
        found["cold_read_us"] = (server.cpu_s() - cpu) / COLD_READS * 1e6
        began, cpu = time.monotonic(), server.cpu_s()
        start, read = b"\0", 0
        while True:
            request = proto.RangeRequest(key=start, range_end=b"\0", limit=10_000)
            answer = call(connection, "KV.Range", request)
            read += len(answer.kvs)
            if not answer.more:
                break
            start = answer.kvs[-1].key + b"\0"
        assert read == keys
        found["all_s"] = time.monotonic() - began
        found["all_cpu_s"] = server.cpu_s() - cpu
        began, cpu = time.monotonic(), server.cpu_s()
        with (
            Client(f"127.0.0.1:{server.port}", timeout_s=600) as client,
            open(os.devnull, "wb") as out,
        ):
            client.snapshot(out)
        found["backup_s"] = time.monotonic() - began
        found["backup_cpu_s"] = server.cpu_s() - cpu
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"plain": [], "encrypted": []}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "keys")
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(sealing.new_key()[1])
        for _ in range(options.rounds):
            for name, found in rounds.items():
                os.environ.pop(KEYS, None)
                if name == "encrypted":
                    os.environ[KEYS] = path
                found.append(one_round(os.path.join(folder, "data"), options.keys))
    print(f"| {options.keys:,} keys | plain | encrypted |\n|---|---|---|")
    for row, text in ROWS.items():
        cells = [statistics.median(one[row] for one in found) for found in rounds.values()]
        print(f"| {text} | " + " | ".join(f"{cell:,.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
