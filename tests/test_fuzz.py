"""Fuzzing, seeded: whatever comes in over a connection or from the disk, only the errors that are
meant to come out do. A hang is caught by pytest's timeout, growth by the limits checked here.

The inputs are of three kinds: noise; well-formed frames and files with bytes changed, cut out,
repeated or swapped; and valid requests with extreme contents. `-m long` does more of it.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from typing import Any

import pytest
from rigs.homes import home
from rigs.lone_member import LoneMember
from rigs.store_rig import read_events
from rigs.wire import take_output

from etcdlite import backup, frames, log, methods, proto, snap
from etcdlite.frames import HANDSHAKE, MAGIC
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from etcdlite.raft import HardState
from etcdlite.raft_log import Entry
from etcdlite.ranges import range_steps
from etcdlite.session import MAX_UNSENT_BYTES
from etcdlite.storage import checkpoint, layout
from etcdlite.storage.data import DataFile
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import DataDamaged
from etcdlite.storage.steps import finish
from etcdlite.wal import WAL, WALError
from etcdlite.wire import streams
from etcdlite.wire.native import NativeSession

ROUNDS = pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 40))]
)

MAX_GROWTH_BYTES = 64 << 20
"""What one round may add to this process: nothing that is kept, and what the allocator keeps."""

INTERESTING = (0, 1, 2, 127, 128, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
KEYS = (b"a", b"b", b"b\0", b"c" * 300, b"\0", b"\xff", b"\xff\xff", b"", b"ab")


@pytest.fixture(autouse=True)
def quiet_log():
    log.configure("fatal", outputs=())
    yield
    log.configure()


# Inputs.


def mutated(rng: random.Random, original: bytes) -> bytes:
    """Some bytes changed, removed, repeated, moved or put in."""
    content = bytearray(original)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice((1, 2, 4, 8, 64)))
        match rng.randrange(7):
            case 0 if to > at:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at:to] = rng.randbytes(to - at)
            case 2:
                del content[at:to]
            case 3:
                content[at:at] = content[at:to] * rng.choice((1, 3))
            case 4:
                content[at:to] = bytes(to - at)
            case 5:
                value = rng.choice(INTERESTING)
                size = rng.choice((1, 2, 4, 8))
                content[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            case _:
                del content[at:]
    return bytes(content)


def message(rng: random.Random, cls: Any, depth: int = 0) -> Any:
    """A message with some of its fields set, to contents that are likely to matter."""
    made = cls()
    alternatives = [field.name for field in cls.FIELDS if field.oneof]
    chosen = rng.choice(alternatives) if alternatives else None
    for field in cls.FIELDS:
        if rng.random() < 0.4 + 0.2 * depth or (field.oneof and field.name != chosen):
            continue
        repeats = rng.choice((0, 1, 1, 3)) if field.repeated else 1
        values = [content_of(rng, field, depth) for _ in range(repeats)]
        setattr(made, field.name, values if field.repeated else values[0])
    return made


def content_of(rng: random.Random, field: Any, depth: int) -> Any:
    match field.kind:
        case "message":
            cls = proto.MESSAGES[field.type_name]
            return message(rng, cls, depth + 1) if depth < 3 else cls()
        case "bytes":
            return rng.choice(KEYS)
        case "string":
            return rng.choice(("", "x", "http://localhost:2380", "\u00e4" * 20))
        case "bool":
            return rng.random() < 0.5
        case kind:
            bits = 64 if kind.endswith("64") else 32
            number = rng.choice((0, 1, 1, 2, 3, 5, 10, 1000, *INTERESTING)) % (1 << bits)
            return number if kind[0] == "u" else number - (number >> (bits - 1) << bits)


def random_frames(rng: random.Random, count: int) -> bytes:
    """Frames of requests of all methods, and of none."""
    out = []
    known = list(methods.METHODS.values())
    for _ in range(count):
        method = rng.choice(known)
        number = method.number if rng.random() < 0.97 else rng.randrange(256)
        request = message(rng, method.request)
        if method.full == "Cluster.MemberAdd":
            # A second voter that does not exist would take the quorum.
            request.isLearner = True
        body = request.encode()
        if rng.random() < 0.1:
            body = mutated(rng, body)
        flags = rng.choice((0, 0, 0, frames.END, frames.CANCEL, 255))
        request_id = rng.choice((*range(1, 30), 2**32 - 1, *range(1, 10_000, 7)))
        out.append(frames.frame(request_id, number, flags, body))
    return b"".join(out)


def chunks(rng: random.Random, content: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        size = rng.choice((1, 2, 9, 10, 11, 100, 5000, 65536))
        yield content[at : at + size]
        at += size


# The front end.


class Front:
    """A session of a lone member, and what it answers; it reads its answers most of the time."""

    def __init__(self, lone: LoneMember, rng: random.Random) -> None:
        self.lone = lone
        self.rng = rng
        self.session = NativeSession(lone.member, lambda session: None)
        self.received = b""

    def feed(self, content: bytes) -> None:
        for chunk in chunks(self.rng, content):
            if self.session.is_closing:
                return
            self.session.receive(chunk)
            if self.rng.random() < 0.3:
                self.lone.settle()
                self.session.produce()
            if self.rng.random() < 0.5:
                self.read()
            assert self.session.outbox.unsent_bytes < 2 * MAX_UNSENT_BYTES

    def read(self) -> None:
        self.received += take_output(self.session)

    def finish(self) -> None:
        self.lone.settle()
        while self.session.has_more:
            self.session.produce()
            self.read()
        self.read()
        self.session.closed()
        self.lone.settle()


def check_answers(received: bytes) -> int:
    """Fails unless it is a handshake and whole frames; how many."""
    if not received:
        return 0
    assert received[:8] == MAGIC
    reader = frames.FrameReader(1 << 30)
    reader.feed(received[HANDSHAKE.size :])
    answers = list(reader)
    ended = set()
    for request_id, _, flags, body in answers:
        if flags & frames.ERROR:
            failure = proto.Error.decode(body)
            assert 0 < failure.code < 17 and failure.message
        if flags & frames.END and request_id:
            ended.add(request_id)
    return len(answers)


@ROUNDS
def test_requests_with_any_content_are_answered_or_refused(tmp_path, seed):
    rng = random.Random(seed)
    lone = LoneMember(tmp_path, seed=seed, max_request_bytes=100_000)
    before = resident_bytes()
    answers = 0
    for _ in range(20):
        front = Front(lone, rng)
        front.feed(HANDSHAKE.pack(MAGIC, 1, 1))
        for _ in range(10):
            front.feed(random_frames(rng, 20))
            lone.tick(rng.choice((0.1, 3.0, 100.0)))
        front.finish()
        answers += check_answers(front.received)
    assert answers > 100, "the fuzz does not reach anything"
    assert resident_bytes() - before < MAX_GROWTH_BYTES
    the_store_is_sound(lone, tmp_path)


@ROUNDS
def test_damaged_frames_in_any_pieces_end_at_most_their_connection(tmp_path, seed):
    rng = random.Random(seed)
    lone = LoneMember(tmp_path, seed=seed, max_request_bytes=100_000)
    before = resident_bytes()
    closed = 0
    for _ in range(150):
        front = Front(lone, rng)
        handshake = HANDSHAKE.pack(MAGIC, 1, 1)
        if rng.random() < 0.1:
            handshake = mutated(rng, handshake)
        front.feed(handshake)
        front.feed(mutated(rng, random_frames(rng, rng.choice((1, 5, 30)))))
        if rng.random() < 0.2:
            front.feed(rng.randbytes(rng.choice((1, 30, 3000))))
        closed += front.session.is_closing
        front.finish()
        check_answers(front.received)
    assert closed, "the fuzz does not reach the limits of the protocol"
    assert resident_bytes() - before < MAX_GROWTH_BYTES
    the_store_is_sound(lone, tmp_path)


def the_store_is_sound(lone: LoneMember, path: Any) -> None:
    """What the requests left is consistent: it can be read at every revision, and is the same after
    a restart."""
    front = Front(lone, random.Random(0))
    put = frames.frame(1, methods.METHOD_BY_NAME["KV.Put"].number, 0, b"\x0a\x05alive")
    lone.member.state.alarms._active.clear()
    front.session.receive(HANDSHAKE.pack(MAGIC, 1, 1) + put)
    front.finish()
    assert check_answers(front.received) == 2
    store = lone.member.state.store
    states = {}
    for revision in range(max(1, store.compacted), store.revision + 1):
        states[revision] = state(store, revision)
    for events_of in range(max(2, store.compacted), store.revision + 1):
        assert read_events(store, events_of, 1), f"revision {events_of} has no events"
    lone.close()
    again = LoneMember(path)
    assert again.member.state.store.revision == store.revision
    for revision, before in states.items():
        assert state(again.member.state.store, revision) == before
    again.close()


def state(store: Store, revision: int) -> bytes:
    request = proto.RangeRequest(key=b"\0", range_end=b"\0", revision=revision)
    return finish(range_steps(store, request))


# Readers of files.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a member with some history, and a snapshot of it."""
    path = tmp_path_factory.mktemp("written")
    rng = random.Random(0)
    lone = LoneMember(path, checkpoint_bytes=4096)
    front = Front(lone, rng)
    session = front.session
    session.receive(HANDSHAKE.pack(MAGIC, 1, 1))
    for number in range(1, 121):
        request: Any = proto.PutRequest(key=b"k%d" % (number % 17), value=b"v" * (number % 50))
        name = "KV.Put"
        if number % 10 == 0:
            request, name = proto.LeaseGrantRequest(TTL=100, ID=number), "Lease.LeaseGrant"
        elif number == 75:
            request, name = proto.CompactionRequest(revision=40), "KV.Compact"
        elif number % 13 == 0:
            request, name = proto.DeleteRangeRequest(key=b"k1", range_end=b"k2"), "KV.DeleteRange"
        frame = frames.frame(number, methods.METHOD_BY_NAME[name].number, 0, request.encode())
        session.receive(frame)
        lone.settle()
        if number == 100:
            lone.tick()
    snapshot = b"".join(
        proto.SnapshotResponse.decode(part).blob for part in streams.snapshot_parts(lone.member)
    )
    (path / "snapshot").write_bytes(snapshot)
    # Not closed: a start then has something to scan behind the checkpoint.
    lone.wal.close()
    return path


def copies(rng: random.Random, source: Any, target: Any, count: int) -> Iterator[bytes]:
    """Writes `count` mutations of a file, one after the other."""
    original = source.read_bytes().rstrip(b"\0") if source.suffix == ".wal" else source.read_bytes()
    size = source.stat().st_size
    for _ in range(count):
        content = mutated(rng, original)
        if source.suffix == ".wal" and rng.random() < 0.8:
            content = content[:size].ljust(size, b"\0")
        target.write_bytes(content)
        yield content


def put_together(written: Any, target: Any) -> None:
    """A copy of the member's folder without copying what stays as it is."""
    for folder in ("data", "wal"):
        (target / "member" / folder).mkdir(parents=True)
        for file in (written / "member" / folder).iterdir():
            (target / "member" / folder / file.name).write_bytes(file.read_bytes())


@ROUNDS
def test_a_damaged_checkpoint_is_refused_and_nothing_else(written, tmp_path, seed):
    rng = random.Random(seed)
    source = written / "member" / "data" / checkpoint.NAME
    target = tmp_path / checkpoint.NAME
    original = source.read_bytes()
    for content in copies(rng, source, target, 300):
        try:
            found = list(checkpoint.unpack(Disk(), str(target)))
        except DataDamaged as damage:
            assert damage.path == str(target) and 0 <= damage.offset <= len(content)
        else:
            assert content == original and found


@ROUNDS
def test_a_checkpoint_whose_checksums_are_right_is_loaded_or_refused(written, tmp_path, seed):
    """As if a broken program had written it: nothing but DataDamaged may come of it, and no store
    that pretends to be good."""
    rng = random.Random(seed)
    put_together(written, tmp_path)
    target = tmp_path / "member" / "data" / checkpoint.NAME
    chunks_ = list(checkpoint.unpack(Disk(), str(target)))
    kept = {path: path.read_bytes() for path in target.parent.iterdir()}
    for _ in range(60):
        at = rng.randrange(len(chunks_))
        kind, body = chunks_[at]
        changed = (
            [*chunks_[:at], *chunks_[at + 1 :]]
            if rng.random() < 0.1
            else [*chunks_[:at], (kind, mutated(rng, body)), *chunks_[at + 1 :]]
        )
        for path, content in kept.items():
            path.write_bytes(content)
        target.write_bytes(b"".join(checkpoint.pack(iter(changed))))
        try:
            Store.open(Disk(), str(target.parent), Lessor(), 1 << 16).close()
        except DataDamaged:
            pass


@ROUNDS
def test_a_damaged_data_file_gives_records_up_to_the_damage(written, tmp_path, seed):
    rng = random.Random(seed)
    source = max((written / "member" / "data").glob("*.seg"), key=lambda path: path.stat().st_size)
    target = tmp_path / source.name
    target.write_bytes(source.read_bytes())
    good = read_records(target)
    assert len(good) > 50
    for _content in copies(rng, source, target, 200):
        seen: list[Any] = []
        try:
            for record in iter_records(target):
                seen.append(record)
        except DataDamaged as damage:
            assert damage.path == str(target)
        # Nothing but what was written; cut out, repeated or moved whole it may be.
        for location, kind, body in seen:
            assert (kind, body) in {(k, b) for _, k, b in good}, f"invented at {location}"


def iter_records(path: Any) -> Iterator[Any]:
    file = DataFile(Disk(), str(path.parent), 1 << 16)
    file.open_segments()
    try:
        number = max(file.files)
        file.check_header(number)
        file.flushed = file.offset
        yield from file.records(number, layout.SEGMENT_HEADER.size, chunk_bytes=512)
    finally:
        file.close()


def read_records(path: Any) -> list[Any]:
    return list(iter_records(path))


def test_zeros_are_no_records(written, tmp_path):
    """A crash can leave them where data was: an empty record of type 0 has the checksum 0."""
    source = max((written / "member" / "data").glob("*.seg"), key=lambda path: path.stat().st_size)
    target = tmp_path / source.name
    content = source.read_bytes()
    first_end = list(iter_records(source))[1][0] & layout.OFFSET_MASK
    target.write_bytes(content[:first_end] + bytes(16) + content[first_end:])
    with pytest.raises(DataDamaged) as damage:
        read_records(target)
    assert damage.value.offset == first_end


@ROUNDS
def test_a_store_with_damaged_files_opens_at_a_mark_or_is_refused(written, tmp_path, seed):
    rng = random.Random(seed)
    put_together(written, tmp_path)
    directory = tmp_path / "member" / "data"
    kept = {path: path.read_bytes() for path in directory.iterdir()}
    store = Store.open(Disk(), str(directory), Lessor(), 1 << 16)
    good = {revision: state(store, revision) for revision in range(40, store.revision + 1)}
    store.close()
    for _ in range(60):
        for path, content in kept.items():
            path.write_bytes(content)
        for path in [path for path in directory.iterdir() if path not in kept]:
            path.unlink()
        path = rng.choice(sorted(kept))
        path.write_bytes(mutated(rng, kept[path]))
        try:
            store = Store.open(Disk(), str(directory), Lessor(), 1 << 16)
            for revision in range(store.compacted, store.revision + 1):
                assert state(store, revision) == good[revision]
            store.close()
        except DataDamaged:
            pass


@ROUNDS
def test_a_damaged_log_opens_with_what_was_saved_or_is_refused(written, tmp_path, seed):
    rng = random.Random(seed)
    put_together(written, tmp_path)
    directory = tmp_path / "member" / "wal"
    sources = {path: path.read_bytes() for path in directory.iterdir()}
    wal, recovered = WAL.open(Disk(), str(directory), 1 << 16)
    wal.close()
    good = {entry.index: entry for entry in recovered.entries}
    for _ in range(100):
        for path in directory.iterdir():
            path.unlink()
        for path, content in sources.items():
            path.write_bytes(content)
        path = rng.choice(sorted(sources))
        size = len(sources[path])
        content = mutated(rng, sources[path].rstrip(b"\0"))
        if rng.random() < 0.8:
            content = content[:size].ljust(size, b"\0")
        path.write_bytes(content)
        try:
            wal, recovered = WAL.open(Disk(), str(directory), 1 << 16)
        except WALError:
            continue
        for entry in recovered.entries:
            assert entry == good[entry.index]
        # It can be gone on with.
        last = wal.last_index
        wal.save(HardState(99, 0, 0), [Entry(99, last + 1, 0, b"more")])
        wal.close()


@ROUNDS
def test_a_damaged_snapshot_is_refused(written, tmp_path, seed):
    rng = random.Random(seed)
    target = tmp_path / "snapshot"
    original = (written / "snapshot").read_bytes()
    assert backup.status(str(written / "snapshot")).total_keys
    for content in copies(rng, written / "snapshot", target, 60):
        if content == original:
            continue
        with pytest.raises(snap.SnapshotError):
            backup.status(str(target))
        with pytest.raises(snap.SnapshotError):
            backup.restore(str(target), home(tmp_path / "restored"))
    assert not (tmp_path / "restored" / "member").exists()


@ROUNDS
def test_a_snapshot_whose_digest_is_not_checked_is_restored_or_refused(written, tmp_path, seed):
    """With --skip-hash-check the files inside speak for themselves."""
    rng = random.Random(seed)
    target = tmp_path / "snapshot"
    for number, _ in enumerate(copies(rng, written / "snapshot", target, 25)):
        try:
            backup.restore(str(target), home(tmp_path / f"restored-{number}"), skip_hash_check=True)
        except snap.SnapshotError:
            pass


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
