"""A load generator for the native protocol that costs the server's machine almost nothing.

One process keeps a fixed number of requests in flight and reports requests per second, latency,
and its own CPU time. On a machine with few cores a generator that costs as much as the server
measures itself; this one stays near a tenth of a microsecond per request, because it never
touches a single request in Python:

- All requests of one cycle over the key space are encoded once, in one buffer. They have one size
  (fixed-width keys, one value size), and request ids 1, 2, 3..., so any batch of requests is a
  slice of that buffer, sent in one call. An id comes round again only after the whole key space,
  which must be far larger than the number in flight.
- Replies are checked a run of equal length at a time: byte 0 of every frame of the run is one
  strided slice, and so are its length, id and flags bytes. A run ends where a length changes.

Every reply is accounted for: an ERROR flag, a frame without END, or a wrong sum of ids at the end
is a failure. Latency is that of one request in `SAMPLE_EVERY`, from the send call that carried it
to the receive call that returned its reply.

Use: python -m bench.native_load put --port 2379 --keys 100000 --requests 1000000
"""

from __future__ import annotations

import argparse
import select
import socket
import struct
import time
from array import array
from dataclasses import asdict, dataclass

from bench.clients import CallFailed, NativeConnection
from etcdlite import methods, proto

KEY_BYTES = 32
VALUE_BYTES = 256
SAMPLE_EVERY = 16
RECEIVE_BYTES = 1 << 20
MAX_UNREAD_BYTES = 1 << 20
"""In flight times the larger of request and reply: the socket calls block, and no more than this
fits between two blocking ends for certain (the server stops reading at 1 MiB of unread replies)."""


def key_of(number: int) -> bytes:
    """The key with this number: 32 bytes, one prefix, spread over 1,000 second-level prefixes."""
    return b"/bench/%03d/%021d" % (number % 1000, number)


def value_of(number: int, size_bytes: int = VALUE_BYTES) -> bytes:
    """A value that differs from key to key and does not compress to nothing."""
    return (b"%d:" % number + bytes(range(33, 127)) * (size_bytes // 94 + 1))[:size_bytes]


@dataclass
class Result:
    """What one run gave. Times in microseconds, rates per second."""

    requests: int
    per_second: float
    p50_us: float
    p99_us: float
    max_us: float
    client_cpu_us: float


class Cycle:
    """The encoded requests for keys 0 .. `keys` - 1, one after the other."""

    def __init__(self, method_name: str, keys: int, value_bytes: int) -> None:
        self.method = methods.METHOD_BY_NAME[method_name]
        self.keys = keys
        frames = []
        for number in range(keys):
            if method_name == "KV.Put":
                body = proto.PutRequest(
                    key=key_of(number), value=value_of(number, value_bytes)
                ).encode()
            else:
                body = proto.RangeRequest(key=key_of(number)).encode()
            frames.append(struct.pack("<IIBB", 6 + len(body), number + 1, self.method.number, 1))
            frames.append(body)
        self.frame_bytes = len(frames[0]) + len(frames[1])
        self.buffer = memoryview(b"".join(frames))
        assert len(self.buffer) == keys * self.frame_bytes, "the requests differ in size"


def scan(buffer: bytes, ids: array[int]) -> int:
    """Append the request ids of all complete frames to `ids`; returns the bytes they take.

    Flat and strided on purpose: a loop over frames costs several times as much as all of this.
    """
    position = 0
    end = len(buffer)
    while end - position >= 10:
        head = buffer[position : position + 4]
        step = 4 + int.from_bytes(head, "little")
        run = (end - position) // step
        if not run:
            break
        if run > 1:
            # The run ends at the first frame whose length differs from the first one's.
            stop = position + run * step
            for byte in range(4):
                column = buffer[position + byte : stop : step]
                same = len(column) - len(column.lstrip(head[byte : byte + 1]))
                if same < run:
                    run = same
                    stop = position + run * step
        stop = position + run * step
        flags = buffer[position + 9 : stop : step]
        if flags != b"\x01" * run:
            raise CallFailed(f"a reply with flags {set(flags)}: {buffer[position:stop][:300]!r}")
        columns = bytearray(4 * run)
        for byte in range(4):
            columns[byte::4] = buffer[position + 4 + byte : stop : step]
        ids.frombytes(columns)
        position = stop
    return position


class Stream:
    """One connection's share of the load."""

    def __init__(self, port: int, cycle: Cycle, first: int, last: int) -> None:
        connection = NativeConnection(port)
        self.socket: socket.socket = connection.socket
        self._cycle = cycle
        self._first = first
        self._next = first
        self._last = last
        self._rest = b""
        self.sent_sum = 0
        self.received_sum = 0
        self.ids = array("I")
        self.sent_at: dict[int, float] = {}
        self.latencies: list[float] = []

    def send(self, count: int) -> None:
        """Send the next `count` requests of this connection's part of the cycle."""
        cycle = self._cycle
        while count:
            number = self._next
            some = min(count, self._last - number)
            size = cycle.frame_bytes
            now = time.perf_counter()
            first_sample = -(-(number + 1) // SAMPLE_EVERY) * SAMPLE_EVERY
            self.sent_at.update(
                dict.fromkeys(range(first_sample, number + some + 1, SAMPLE_EVERY), now)
            )
            self.socket.sendall(cycle.buffer[number * size : (number + some) * size])
            # The ids are number + 1 .. number + some.
            self.sent_sum += some * (2 * number + some + 1) // 2
            self._next = number + some
            if self._next == self._last:
                self._next = self._first
            count -= some

    def receive(self) -> int:
        """Read once; returns how many replies were completed."""
        data = self.socket.recv(RECEIVE_BYTES)
        now = time.perf_counter()
        if not data:
            raise CallFailed("the server closed the connection")
        if self._rest:
            data = self._rest + data
        ids = array("I")
        used = scan(data, ids)
        self._rest = data[used:]
        self.received_sum += sum(ids)
        sent_at = self.sent_at
        for request_id in ids:
            if not request_id % SAMPLE_EVERY:
                self.latencies.append(now - sent_at.pop(request_id))
        return len(ids)


def run(
    port: int,
    method_name: str,
    *,
    requests: int,
    keys: int,
    in_flight: int = 1000,
    connections: int = 1,
    value_bytes: int = VALUE_BYTES,
    cycle: Cycle | None = None,
) -> Result:
    """Send `requests` requests ("KV.Put" or "KV.Range") and wait for all replies.

    Raises CallFailed on any reply that is not a success.
    """
    cycle = cycle or Cycle(method_name, keys, value_bytes)
    share = in_flight // connections
    if keys // connections < 2 * share:
        raise ValueError("the key space must be at least twice the number in flight")
    if share * max(cycle.frame_bytes, value_bytes + 128) > MAX_UNREAD_BYTES:
        raise ValueError("too many bytes in flight for blocking sockets; use more connections")
    poll = select.poll()
    streams = {}
    for number in range(connections):
        stream = Stream(
            port, cycle, keys * number // connections, keys * (number + 1) // connections
        )
        streams[stream.socket.fileno()] = stream
        poll.register(stream.socket, select.POLLIN)
    cpu = time.process_time()
    began = time.perf_counter()
    unsent = requests
    for stream in streams.values():
        some = min(share, unsent)
        stream.send(some)
        unsent -= some
    unanswered = requests
    while unanswered:
        for fd, _ in poll.poll():
            stream = streams[fd]
            got = stream.receive()
            unanswered -= got
            if unsent and got:
                some = min(got, unsent)
                stream.send(some)
                unsent -= some
    seconds = time.perf_counter() - began
    cpu = time.process_time() - cpu
    latencies = []
    for stream in streams.values():
        stream.socket.close()
        if stream.sent_sum != stream.received_sum:
            raise CallFailed("the ids of the replies are not those of the requests")
        latencies += stream.latencies
    latencies.sort()
    return Result(
        requests=requests,
        per_second=requests / seconds,
        p50_us=latencies[len(latencies) // 2] * 1e6,
        p99_us=latencies[len(latencies) * 99 // 100] * 1e6,
        max_us=latencies[-1] * 1e6,
        client_cpu_us=cpu / requests * 1e6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a native-protocol server.")
    parser.add_argument("operation", choices=["put", "range"])
    parser.add_argument("--port", type=int, default=2379)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=100_000, help="size of the key space")
    parser.add_argument("--in-flight", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--value-bytes", type=int, default=VALUE_BYTES)
    options = parser.parse_args()
    result = run(
        options.port,
        "KV.Put" if options.operation == "put" else "KV.Range",
        requests=options.requests,
        keys=options.keys,
        in_flight=options.in_flight,
        connections=options.connections,
        value_bytes=options.value_bytes,
    )
    for name, value in asdict(result).items():
        print(f"{name:>14} {value:,.2f}")


if __name__ == "__main__":
    main()
