"""Bad input and greed: each costs its own connection or request at most. The server keeps serving
others, its memory stays bounded, and nothing is lost."""

from __future__ import annotations

import json
import random
import resource
import socket
import sys
import threading
import time

import pytest
from rigs.lone_member import LoneMember, turn
from rigs.processes import PATIENCE_S, RawConnection, ServerProcess, wait_until

from etcdlite import errors, frames, methods, proto
from etcdlite.client import (
    EtcdliteError,
    Put,
    RequestTooLarge,
    TooManyOps,
)
from etcdlite.frames import FRAME, HANDSHAKE, MAGIC
from etcdlite.limits import DEFAULT_LIMITS, fitting
from etcdlite.replica.background import SLICE_S
from etcdlite.server import SESSION_TICK_S
from etcdlite.session import HANDSHAKE_TIMEOUT_S
from etcdlite.wire.native import MAX_OPEN_REQUESTS, NativeSession

MAX_REQUEST_BYTES = 1_572_864
"""The server's default."""

OVERHEAD_BYTES = 512 * 1024

MEMORY_OF_IDLE_CONNECTION_BYTES = 16 * 1024
"""What the server may need for a connection that says nothing after its handshake."""

MEMORY_OF_DEAF_CLIENT_BYTES = 48 << 20
"""What a client that never reads may make the server hold: the high-water mark, what one read of
its requests can ask for, and what the allocator keeps of it."""

IDLE_CONNECTIONS = 10_000

PUT = methods.METHOD_BY_NAME["KV.Put"].number
RANGE = methods.METHOD_BY_NAME["KV.Range"].number
WATCH = methods.METHOD_BY_NAME["Watch.Watch"].number


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    one = ServerProcess(
        tmp_path_factory.mktemp("shared") / "data", (), (sys.executable, "-m", "etcdlite")
    )
    yield one
    one.close()


@pytest.fixture
def running(shared):
    """A server that those tests share that leave nothing behind."""
    if not shared.is_running:
        shared.start()
    yield shared
    print(shared.tail())
    assert shared.is_running, "the server has ended"


def serves(running) -> None:
    """Fails unless it takes writes and reads."""
    with running.client() as client:
        revision = client.put("alive", "yes").revision
        found = client.get("alive")
        assert (found.value, found.mod_revision) == (b"yes", revision)


def closed_with(raw: RawConnection, text: str) -> None:
    """Fails unless the connection ends with an error about no request that says `text`."""
    request_id, error = raw.error()
    assert request_id == 0
    assert text in error.message
    assert raw.is_closed()


# The connection as a whole.


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_frame_shorter_than_its_header_ends_the_connection(running, length):
    raw = running.talk()
    raw.sock.sendall(FRAME.pack(length, 1, PUT, 0))
    closed_with(raw, f"length {length}")
    serves(running)


@pytest.mark.parametrize("length", [MAX_REQUEST_BYTES + OVERHEAD_BYTES + 1, 2**32 - 1])
def test_a_frame_that_is_too_large_ends_the_connection_before_it_has_come(running, length):
    raw = running.talk()
    raw.sock.sendall(FRAME.pack(length, 1, PUT, 0))
    closed_with(raw, f"length {length}")
    serves(running)


def test_a_request_with_the_id_zero_ends_the_connection(running):
    raw = running.talk()
    raw.sock.sendall(frames.frame(0, RANGE, 0, proto.RangeRequest(key=b"k").encode()))
    closed_with(raw, "id 0")
    serves(running)


def test_an_id_that_is_open_on_another_method_ends_the_connection(running):
    raw = running.talk()
    raw.sock.sendall(frames.frame(1, WATCH, 0, b"") + frames.frame(1, PUT, 0, b""))
    closed_with(raw, "in use")
    serves(running)


def test_what_came_before_the_fault_is_carried_out(running):
    raw = running.talk()
    put = frames.frame(1, PUT, 0, proto.PutRequest(key=b"before", value=b"1").encode())
    raw.sock.sendall(put + FRAME.pack(3, 2, PUT, 0) + put)
    raw.is_closed()
    with running.client() as client:
        wait_until(lambda: client.get("before"), "the put before the fault is applied")
        assert client.get("before").version == 1


def test_a_broken_message_costs_its_request_only(running):
    raw = running.talk()
    broken = (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0a\x05abc", b"\x80", b"\x0b")
    for number, body in enumerate(broken, 1):
        raw.sock.sendall(frames.frame(number, PUT, 0, body))
        request_id, error = raw.error()
        assert (request_id, error.code) == (number, errors.INVALID_ARGUMENT)
    raw.ping()
    for number, body in enumerate(broken, 101):
        raw.sock.sendall(frames.frame(number, WATCH, 0, body))
        request_id, error = raw.error()
        assert (request_id, error.code) == (number, errors.INVALID_ARGUMENT)
    raw.ping()
    serves(running)


@pytest.mark.parametrize("method", [0x00, 0x0F, 0x99, 0xE1, 0xFF])
def test_a_method_that_does_not_exist_costs_its_request_only(running, method):
    raw = running.talk()
    raw.sock.sendall(frames.frame(1, method, 0, b"whatever"))
    request_id, error = raw.error()
    assert (request_id, error.code) == (1, errors.UNIMPLEMENTED)
    raw.ping()


def test_more_open_requests_than_allowed_end_the_connection(running):
    raw = running.talk()
    opened = b"".join(
        frames.frame(number, WATCH, 0, b"") for number in range(1, MAX_OPEN_REQUESTS + 2)
    )
    raw.sock.sendall(opened)
    closed_with(raw, f"more than {MAX_OPEN_REQUESTS}")
    serves(running)


def test_http_is_served_on_the_same_port_however_it_is_cut(running):
    sock = running.connect()
    for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n":
        sock.sendall(bytes((byte,)))
    answer = b""
    while data := sock.recv(4096):
        answer += data
    head, _, text = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(text) == {"health": "true", "reason": ""}
    serves(running)


def test_a_client_of_another_protocol_version_is_told_and_closed(running):
    sock = running.connect()
    sock.sendall(HANDSHAKE.pack(MAGIC, 2, 9))
    answer = b""
    while data := sock.recv(4096):
        answer += data
    assert HANDSHAKE.unpack(answer) == (MAGIC, 0, 0)
    serves(running)


def test_a_handshake_may_come_byte_by_byte(running):
    sock = running.connect()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    put = frames.frame(5, PUT, 0, proto.PutRequest(key=b"slow", value=b"1").encode())
    with running.client() as client:
        for byte in HANDSHAKE.pack(MAGIC, 1, 1) + put:
            sock.sendall(bytes((byte,)))
            client.get("x")  # The server takes a turn, so each byte is read by itself.
        wait_until(lambda: client.get("slow"), "the put that came byte by byte is applied")


def test_half_a_handshake_is_dropped_in_time(server, monkeypatch):
    """The limit is made short in a server of its own program: nobody wants to wait for the real
    one in a test."""
    assert HANDSHAKE_TIMEOUT_S == 10.0
    impatient = "; ".join(
        (
            "import sys",
            "from etcdlite import session",
            "session.HANDSHAKE_TIMEOUT_S = 2.0",
            "from etcdlite.__main__ import main",
            "sys.exit(main(sys.argv[1:]))",
        )
    )
    running = server(program=(sys.executable, "-c", impatient))
    good = running.talk()
    silent, half = running.connect(), running.connect()
    half.sendall(MAGIC[:5])
    assert silent.recv(1) == b""
    assert half.recv(1) == b""
    good.ping()
    running.wait_for_log("did not open the protocol in time")
    serves(running)


def test_garbage_from_many_connections_harms_nobody(running):
    rng = random.Random(8)
    good = running.talk()
    before = running.rss_bytes
    for number in range(400):
        sock = running.connect()
        try:
            if number % 2:
                sock.sendall(HANDSHAKE.pack(MAGIC, 1, 1))
            sock.sendall(rng.randbytes(rng.choice((1, 7, 100, 5000))))
        except ConnectionError:
            pass  # It was faster than the garbage.
        if number % 3:
            sock.close()
        if number % 50 == 0:
            good.ping()
    serves(running)
    assert running.rss_bytes - before < 16 << 20


# Many connections.


def test_ten_thousand_idle_connections_cost_little_and_the_server_goes_on(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(IDLE_CONNECTIONS, hard - 500)
    if count < 1000:
        pytest.skip(f"this process may have only {hard} open files")
    running = server()
    before = running.rss_bytes
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    socks = []
    try:
        host, port = running.endpoint.rsplit(":", 1)
        for number in range(count):
            sock = socket.create_connection((host, int(port)), PATIENCE_S)
            socks.append(sock)
            # Of three kinds: at rest, in the middle of a frame, and saying nothing.
            if number % 3 == 0:
                sock.sendall(HANDSHAKE.pack(MAGIC, 1, 1))
            elif number % 3 == 1:
                sock.sendall(HANDSHAKE.pack(MAGIC, 1, 1) + FRAME.pack(1000, 1, PUT, 0))
            if number % 1000 == 0:
                serves(running)
        serves(running)
        growth = running.rss_bytes - before
        assert growth < count * MEMORY_OF_IDLE_CONNECTION_BYTES, f"{growth / count:.0f} B each"
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    serves(running)


def test_connections_above_the_limit_are_refused_and_places_become_free(server):
    running = server("--max-connections=10")
    client = running.client()
    client.put("k", "v")
    open_ = [running.talk() for _ in range(9)]
    refused = running.connect()
    try:
        refused.sendall(HANDSHAKE.pack(MAGIC, 1, 1))
        assert refused.recv(1) == b""
    except ConnectionError:
        pass
    assert running.wait_for_log("max-connections")
    for raw in open_:
        raw.ping()
    open_.pop().sock.close()

    def place() -> bool:
        sock = running.connect()
        try:
            sock.sendall(HANDSHAKE.pack(MAGIC, 1, 1))
            return bool(sock.recv(1))
        except ConnectionError:
            return False

    wait_until(place, "a place becomes free")
    assert client.get("k").value == b"v"


def test_running_out_of_file_descriptors_is_survived(server):
    """The hard limit is lowered in the server's program, because it raises the soft one."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "from etcdlite.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    running = server(program=(sys.executable, "-c", program))
    client = running.client()
    client.put("k", "v")
    socks = [running.connect() for _ in range(100)]
    assert "open-files=64" in running.wait_for_log("the limit of open files is low")
    running.wait_for_log("refused a connection: connection limit reached")
    client.defragment()  # There are descriptors left for the data.
    assert client.put("k", "w").revision == 3
    for sock in socks:
        sock.close()
    wait_until(lambda: _can_connect(running), "connections are accepted again")
    serves(running)


def _can_connect(running) -> bool:
    try:
        running.talk().ping()
    except (ConnectionError, EOFError):
        return False
    return True


# Those who ask and do not read.

BIG_KEYS = 1000
BIG_VALUE_BYTES = 1000


@pytest.fixture
def full(server):
    """A server with a megabyte of data, and its memory when it has that."""
    running = server()
    with running.client() as client:
        for start in range(0, BIG_KEYS, 100):
            client.txn(
                success=[
                    Put(f"big/{n:04}", b"v" * BIG_VALUE_BYTES) for n in range(start, start + 100)
                ]
            )
        for _ in range(3):
            client.range(prefix="big/")
    return running


def others_are_served(running, turns: int = 50) -> None:
    with running.client() as client:
        for turn in range(turns):
            client.put("other", str(turn))
            assert client.get("other").value == str(turn).encode()


def pipeline_deaf(raw: RawConnection, frames: bytes) -> None:
    """Send all of it, or as much as is taken without being read from."""
    raw.sock.settimeout(0.5)
    try:
        raw.sock.sendall(frames)
    except TimeoutError:
        pass  # The server has stopped listening, as it should.


def test_a_client_that_pipelines_big_ranges_and_never_reads_is_held_back(full):
    before = full.rss_bytes
    raw = full.talk(buffer_bytes=4096)
    request = proto.RangeRequest(key=b"big/", range_end=b"big0").encode()
    pipeline_deaf(raw, b"".join(frames.frame(n, RANGE, 0, request) for n in range(1, 20_001)))
    others_are_served(full)
    full.wait_until_idle()
    growth = full.peak_rss_bytes - before
    assert growth < MEMORY_OF_DEAF_CLIENT_BYTES, f"{growth >> 20} MiB for one deaf client"


def test_a_client_that_opens_watches_on_much_history_and_never_reads_is_held_back(full):
    before = full.rss_bytes
    raw = full.talk(buffer_bytes=4096)
    create = proto.WatchCreateRequest(key=b"big/", range_end=b"big0", start_revision=1)
    request = proto.WatchRequest(create_request=create).encode()
    pipeline_deaf(raw, b"".join(frames.frame(n, WATCH, 0, request) for n in range(1, 201)))
    others_are_served(full)
    with full.client() as client:
        for turn in range(20):
            client.txn(
                success=[Put(f"big/{n:04}", b"w" * BIG_VALUE_BYTES) for n in range(turn, 100)]
            )
    full.wait_until_idle()
    growth = full.peak_rss_bytes - before
    assert growth < MEMORY_OF_DEAF_CLIENT_BYTES, f"{growth >> 20} MiB for one deaf client"


def test_a_deaf_client_that_begins_to_read_gets_every_answer(full):
    raw = full.talk(buffer_bytes=4096)
    request = proto.RangeRequest(key=b"big/", range_end=b"big0").encode()
    count = 200
    sender = threading.Thread(
        target=raw.sock.sendall,
        args=(b"".join(frames.frame(n, RANGE, 0, request) for n in range(1, count + 1)),),
    )
    sender.start()
    others_are_served(full)
    answered = set()
    for _ in range(count):
        request_id, _, flags, body = raw.receive()
        assert flags == frames.END
        assert proto.RangeResponse.decode(body).count == BIG_KEYS
        answered.add(request_id)
    sender.join()
    assert answered == set(range(1, count + 1))


def test_a_client_that_takes_a_snapshot_and_never_reads_is_held_back(full):
    before = full.rss_bytes
    method = methods.METHOD_BY_NAME["Maintenance.Snapshot"].number
    raws = [full.talk(buffer_bytes=4096) for _ in range(4)]
    for raw in raws:
        pipeline_deaf(raw, b"".join(frames.frame(n, method, 0, b"") for n in range(1, 51)))
    others_are_served(full)
    full.wait_until_idle()
    growth = full.peak_rss_bytes - before
    assert growth < MEMORY_OF_DEAF_CLIENT_BYTES, f"{growth >> 20} MiB for four deaf clients"


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_NOTSENT_LOWAT is Linux's")
def test_the_server_sees_a_slow_reader_read(server):
    """The kernel must not hold so much of an answer that reading some of it changes nothing."""
    running = server()
    with running.client() as client:
        for n in range(8):
            client.put(f"k{n}", bytes(1_000_000))
    host, _, port = running.endpoint.rpartition(":")

    def held_bytes():
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        (line,) = (x for x in text.splitlines() if x.startswith("etcdlite_connection_memory_bytes"))
        return float(line.split()[1])

    raw = running.talk(buffer_bytes=32 << 10)
    request = proto.RangeRequest(key=b"k", range_end=b"l").encode()
    raw.sock.sendall(frames.frame(1, RANGE, frames.END, request))
    wait_until(lambda: held_bytes() > 5_000_000, "the answer waits")
    time.sleep(2 * SESSION_TICK_S)  # The count is made this often.
    before = held_bytes()
    left = 600_000
    while left:
        left -= len(raw.sock.recv(min(left, 65536)))
    wait_until(lambda: held_bytes() < before - 300_000, "the server has sent more")


def test_a_slow_watcher_misses_nothing(full):
    raw = full.talk(buffer_bytes=4096)
    create = proto.WatchCreateRequest(key=b"big/", range_end=b"big0", start_revision=1)
    raw.send(1, "Watch.Watch", proto.WatchRequest(create_request=create), flags=0)
    with full.client() as client:
        for turn in range(30):
            client.txn(
                success=[
                    Put(f"big/{n:04}", b"w" * BIG_VALUE_BYTES) for n in range(turn, turn + 100)
                ]
            )
        revision = client.status().revision
    assert DEFAULT_LIMITS.high_water_bytes < 30 * 100 * BIG_VALUE_BYTES
    revisions = []
    while not revisions or revisions[-1] < revision:
        response = proto.WatchResponse.decode(raw.receive()[3])
        revisions += [event.kv.mod_revision for event in response.events]
    assert revisions == sorted(revisions)
    assert len(revisions) == BIG_KEYS + 30 * 100
    assert set(revisions) == set(range(2, revision + 1))


def test_a_burst_of_ranges_is_answered_over_many_turns(tmp_path):
    """However many come at once, one turn does not take longer than its slice."""
    lone = LoneMember(tmp_path)
    session = NativeSession(lone.member, lambda session: None)
    session.receive(HANDSHAKE.pack(MAGIC, 1, 1))
    ranges = proto.RangeRequest(key=b"a", range_end=b"b").encode()
    session.receive(b"".join(frames.frame(n, RANGE, 0, ranges) for n in range(1, 1001)))

    def look() -> float:
        lone.now += SLICE_S / 10
        return lone.now

    lone.member.clock = look
    answered = []
    for _ in range(20):
        before = len(session.outbox.parts)
        turn(lone.member)
        answered.append((len(session.outbox.parts) - before) // 2)
    assert max(answered) <= 20 and sum(answered) > 20, answered
    lone.settle()
    assert len(session.outbox.parts) // 2 >= 1000
    lone.close()


# Requests that ask for too much.


TELLING = """
import sys
from etcdlite import datadir
from etcdlite.__main__ import main
open_member = datadir.open_member
def told(*args, limits, **named):
    print("large reads at once:", limits.max_slow_reads, file=sys.stderr)
    return open_member(*args, limits=limits, **named)
datadir.open_member = told
sys.exit(main())
"""
"""etcdlite that says how many large reads run at once."""


@pytest.mark.parametrize(("memory_limit", "reads"), [(64 << 20, 1), (400 << 20, 2), (1 << 40, 4)])
def test_few_large_reads_run_at_once_if_there_is_little_memory(server, memory_limit, reads):
    """In a container of 512 MB, four of the largest ones took more memory than there was."""
    program = (sys.executable, "-c", TELLING)
    running = server(f"--memory-limit={memory_limit}", program=program)
    running.wait_for_log(f"large reads at once: {reads}")
    assert fitting(memory_limit) == DEFAULT_LIMITS._replace(max_slow_reads=reads)


def test_a_request_over_the_limit_is_refused_in_etcds_words(server):
    running = server("--max-request-bytes=10000")
    client = running.client()
    assert client.put("k", b"v" * 9000).revision == 2
    with pytest.raises(RequestTooLarge) as refused:
        client.put("k", b"v" * 10_001)
    assert refused.value.text == "etcdserver: request is too large"
    assert refused.value.code == errors.INVALID_ARGUMENT
    with pytest.raises(RequestTooLarge):
        client.txn(success=[Put(f"k{n}", b"v" * 1000) for n in range(11)])
    assert client.get("k").mod_revision == 2
    raw = running.talk()
    assert raw.hello.max_request_bytes == 10_000


def test_a_request_of_exactly_the_limit_is_taken(server):
    running = server("--max-request-bytes=10000")
    client = running.client()
    overhead = len(proto.PutRequest(key=b"k", value=b"v" * 9000).encode()) - 9000
    client.put("k", b"v" * (10_000 - overhead))
    with pytest.raises(RequestTooLarge):
        client.put("k", b"v" * (10_001 - overhead))


def test_a_transaction_of_too_many_operations_is_refused_in_etcds_words(server):
    running = server("--max-txn-ops=5")
    client = running.client()
    client.txn(success=[Put(f"k{n}", "v") for n in range(5)])
    with pytest.raises(TooManyOps) as refused:
        client.txn(success=[Put(f"k{n}", "v") for n in range(6)])
    assert refused.value.text == "etcdserver: too many operations in txn request"
    assert refused.value.code == errors.INVALID_ARGUMENT
    assert client.status().revision == 2


@pytest.mark.parametrize("kind", [3, 256, -1, 2**31 - 1])
def test_an_alarm_of_no_known_kind_is_not_raised(running, kind):
    raw = running.talk()
    raw.send(1, "Maintenance.Alarm", proto.AlarmRequest(action=1, memberID=1, alarm=kind))
    request_id, _, flags, body = raw.receive()
    assert (request_id, flags) == (1, frames.END)
    assert not proto.AlarmResponse.decode(body).alarms
    assert running.client().alarms() == ()
    serves(running)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda c: c.put("", "v"), "etcdserver: key is not provided"),
        (lambda c: c.get(""), "etcdserver: key is not provided"),
        (lambda c: c.delete(""), "etcdserver: key is not provided"),
        (lambda c: c.put("k", "v", ignore_value=True), "etcdserver: value is provided"),
        (lambda c: c.put("no", ignore_value=True), "etcdserver: key not found"),
        (lambda c: c.put("k", lease=7, ignore_lease=True), "etcdserver: lease is provided"),
        (lambda c: c.put("k", lease=7), "etcdserver: requested lease not found"),
        (lambda c: c.lease_revoke(7), "etcdserver: requested lease not found"),
        (lambda c: c.lease_grant(10**10), "etcdserver: too large lease TTL"),
        (
            lambda c: c.txn(success=[Put("k", "1"), Put("k", "2")]),
            "etcdserver: duplicate key given in txn request",
        ),
        (
            lambda c: c.range("k", revision=10**6),
            "etcdserver: mvcc: required revision is a future revision",
        ),
        (lambda c: c.compact(10**6), "etcdserver: mvcc: required revision is a future revision"),
    ],
)
def test_a_refused_request_has_etcds_text_and_changes_nothing(running, call, text):
    client = running.client()
    revision = client.status().revision
    with pytest.raises(EtcdliteError) as refused:
        call(client)
    assert refused.value.text == text
    assert client.status().revision == revision
