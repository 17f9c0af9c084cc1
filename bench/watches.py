"""Watches over gRPC: how soon those that are behind catch up, for both servers alike.

- resume: `watches` watches, each on a key of its own, are created 11,000 revisions back; the time
  until the last of the 11,000 events has come;
- history: one watch on a prefix; events per second while it reads `history` revisions;
- pipelined: `watches` watches that are synced and as many puts, 1,000 in flight; the time until the
  last event has come.

    python -m bench.watches [--watches 10000] [--history 100000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time

from bench.clients import GrpcConnection, pipeline
from bench.servers import Server
from etcdlite import methods, proto

RESUMED_REVISIONS = 11_000
WATCHES_PER_STREAM = 500
"""Their requests fit into the initial window of a stream."""

_DATA = 0
_EVENT_TAG = 0x5A


class WatchConnection(GrpcConnection):
    """A connection that counts the watches created on it and their events."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.created = 0
        self.events = 0
        self._messages: dict[int, bytearray] = {}

    def create(self, requests: list[proto.WatchCreateRequest]) -> None:
        method = methods.METHOD_BY_NAME["Watch.Watch"]
        for at in range(0, len(requests), WATCHES_PER_STREAM):
            self._next_id += 2
            bodies = (
                proto.WatchRequest(create_request=request).encode()
                for request in requests[at : at + WATCHES_PER_STREAM]
            )
            data = b"".join(b"\0" + len(body).to_bytes(4, "big") + body for body in bodies)
            while self._window_bytes < len(data):
                self._read_frames()
            self._window_bytes -= len(data)
            out = [_frame(1, self._next_id, self._header_block(method), flags=4)]
            out += [
                _frame(_DATA, self._next_id, data[i : i + 16384])
                for i in range(0, len(data), 16384)
            ]
            self.socket.sendall(b"".join(out))

    def wait(self, created: int, events: int) -> None:
        while self.created < created or self.events < events:
            self._read_frames()

    def receive_frames(self) -> None:
        """Wait for a single read, and count what it brings."""
        self._read_frames()

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        super()._take_frame(kind, flags, stream, payload)
        if kind != _DATA:
            return
        self._bodies.clear()
        pending = self._messages.setdefault(stream, bytearray())
        pending += payload
        at = 0
        while len(pending) - at >= 5:
            end = at + 5 + int.from_bytes(pending[at + 1 : at + 5], "big")
            if end > len(pending):
                break
            self._count(pending, at + 5, end)
            at = end
        del pending[:at]

    def _count(self, body: bytearray, at: int, end: int) -> None:
        """Count the fields of a WatchResponse, without decoding what is in them."""
        while at < end:
            tag = body[at]
            size = shift = 0
            while True:
                at += 1
                size |= (body[at] & 127) << shift
                shift += 7
                if body[at] < 128:
                    break
            at += 1
            if tag & 7 == 2:
                at += size
                self.events += tag == _EVENT_TAG
            elif tag == 0x18:
                self.created += 1


def _frame(kind: int, stream: int, payload: bytes, flags: int = 0) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags))
    return head + stream.to_bytes(4, "big") + payload


def _puts(port: int, keys: list[bytes], size: int = 100) -> None:
    connections = [GrpcConnection(port) for _ in range(10)]
    bodies = (proto.PutRequest(key=key, value=b"v" * size).encode() for key in keys)
    pipeline(list(connections), "KV.Put", bodies, 1000)
    for connection in connections:
        connection.close()


def measure(name: str, folder: str, watches: int, history: int) -> dict[str, float]:
    """One round for one server: figures by name."""
    figures = {}
    keys = [b"watched/%06d" % n for n in range(watches)]
    with Server(name, folder) as server:
        _puts(server.port, [keys[n % watches] for n in range(RESUMED_REVISIONS)])
        connection = WatchConnection(server.port)
        began = time.perf_counter()
        connection.create([proto.WatchCreateRequest(key=key, start_revision=2) for key in keys])
        connection.wait(watches, RESUMED_REVISIONS)
        figures["resume_s"] = time.perf_counter() - began

        connection.events = 0
        writer = threading.Thread(target=_puts, args=(server.port, keys))
        began = time.perf_counter()
        writer.start()
        connection.wait(watches, watches)
        figures["pipelined_s"] = time.perf_counter() - began
        writer.join()
        connection.close()

        _puts(server.port, [b"history/%06d" % n for n in range(history)])
        connection = WatchConnection(server.port)
        began = time.perf_counter()
        everything = proto.WatchCreateRequest(key=b"h", range_end=b"i", start_revision=2)
        connection.create([everything])
        connection.wait(1, history)
        figures["history_events_per_s"] = history / (time.perf_counter() - began)
        connection.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watches", type=int, default=10_000)
    parser.add_argument("--history", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"etcdlite": [], "etcd": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, rounds in results.items():
                rounds.append(measure(name, folder, options.watches, options.history))
    for figure in results["etcd"][0]:
        medians = {
            name: statistics.median(round_[figure] for round_ in rounds)
            for name, rounds in results.items()
        }
        print(figure, *(f"{name} {value:,.2f}" for name, value in medians.items()), sep="  ")


if __name__ == "__main__":
    main()
