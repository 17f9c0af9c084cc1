"""The write-ahead log against a disk that fails, forgets and flips bits.

The claim behind all of these: what `save` returned for is there after anything a disk may do in a
crash; what was not saved never is; and where the log cannot tell, it says so and changes nothing.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import zlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rigs.faulty_disk import SIZE, FaultyDisk
from rigs.keys import keyring

from etcdlite import wal as wal_module
from etcdlite.raft import HardState
from etcdlite.raft_log import Entry
from etcdlite.sealing import Keyring
from etcdlite.storage.disk import Disk
from etcdlite.wal import WAL, Recovered, WALDamaged, WALError, WALVersionError

FOLDER = "member/wal"
SEGMENT_BYTES = 1024  # 512 of them for the header

State = tuple[HardState, tuple[int, int], list[Entry]]
NOTHING: State = (HardState(0, 0, 0), (0, 0), [])


def entry(index: int, term: int = 1, size_bytes: int = 20, kind: int = 0) -> Entry:
    data = b"%d/%d:" % (index, term)
    return Entry(term, index, kind, (data * (size_bytes // len(data) + 1))[:size_bytes])


def entries(first: int, last: int, term: int = 1, size_bytes: int = 20) -> list[Entry]:
    return [entry(index, term, size_bytes) for index in range(first, last + 1)]


KEYS: dict[str, Keyring | None] = {"now": None}
"""The keys that `create` and `reopen` use."""


@pytest.fixture(params=["plain", "sealed"])
def is_sealed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a test on a plain log and on a sealed one."""
    if request.param == "sealed":
        monkeypatch.setitem(KEYS, "now", keyring(1))
    return bool(request.param == "sealed")


def create(disk: Disk, segment_bytes: int = SEGMENT_BYTES) -> WAL:
    return WAL.create(disk, FOLDER, b"cluster 1, member 2", segment_bytes, keys=KEYS["now"])


def reopen(disk: Disk, segment_bytes: int = SEGMENT_BYTES) -> tuple[WAL, Recovered]:
    return WAL.open(disk, FOLDER, segment_bytes, keys=KEYS["now"])


def state(recovered: Recovered) -> State:
    """What counts of a recovery: entries that the snapshot covers may be there or not."""
    index = recovered.snapshot[0]
    return (
        recovered.hard_state,
        recovered.snapshot,
        [entry for entry in recovered.entries if entry.index > index],
    )


def size_of(wal: WAL) -> int:
    """Space on disk, reserved space included."""
    return sum(segment.size_bytes for segment in wal.segments)


def path(segment: int) -> str:
    return f"{FOLDER}/{segment:016x}.wal"


class Model:
    """The log as a list, and the state after each change that returned."""

    def __init__(self) -> None:
        self.hard_state, self.snapshot, self.entries = NOTHING
        self.history: list[State] = [NOTHING]

    def save(self, wal: WAL, hard_state: HardState | None, new: list[Entry]) -> None:
        log = [e for e in self.entries if not new or e.index < new[0].index] + new
        self._change(hard_state or self.hard_state, self.snapshot, log)
        wal.save(hard_state, new)
        self._done()

    def mark_snapshot(self, wal: WAL, index: int, term: int, discard_log: bool = False) -> None:
        keep = [] if discard_log or index > self.last_index else self.entries
        log = [e for e in keep if e.index > index]
        self._change(self.hard_state, (index, term), log)
        wal.mark_snapshot(index, term, discard_log=discard_log)
        self._done()

    @property
    def last_index(self) -> int:
        return self.entries[-1].index if self.entries else self.snapshot[0]

    def _change(self, *after: object) -> None:
        self.attempted: State = after  # type: ignore[assignment]

    def _done(self) -> None:
        self.hard_state, self.snapshot, self.entries = self.attempted
        self.history.append(self.attempted)


def write_history(wal: WAL, model: Model) -> None:
    """Every kind of write, over four segments of 1 KiB and a larger one; releases the first."""
    model.save(wal, HardState(1, 2, 0), [])
    model.save(wal, HardState(1, 2, 1), entries(1, 3))
    model.save(wal, None, [entry(4, kind=1), *entries(5, 8)])
    model.save(wal, HardState(2, 0, 4), entries(6, 9, term=2, size_bytes=60))
    model.mark_snapshot(wal, 7, 2)
    wal.release(7)
    model.save(wal, HardState(2, 0, 9), entries(10, 14, term=2, size_bytes=30))
    model.mark_snapshot(wal, 20, 3)
    wal.release(20)
    model.save(wal, HardState(3, 1, 20), [])
    model.save(wal, None, [entry(21, 3, 1200)])
    model.save(wal, HardState(3, 1, 21), entries(22, 24, term=3))
    model.save(wal, None, entries(23, 23, term=4))


# What is saved is there


@pytest.mark.parametrize("make_disk", [Disk, FaultyDisk])
def test_what_was_saved_is_there_after_reopening(
    make_disk: Callable[[], Disk], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]
    disk, model = make_disk(), Model()
    assert not WAL.exists(disk, FOLDER)
    wal = create(disk)
    write_history(wal, model)
    size_bytes = size_of(wal)
    wal.close()
    assert WAL.exists(disk, FOLDER)
    wal, recovered = reopen(disk)
    assert state(recovered) == model.history[-1]
    assert recovered.metadata == b"cluster 1, member 2"
    assert recovered.torn is None
    assert (wal.last_index, wal.hard_state, wal.snapshot) == (23, HardState(3, 1, 21), (20, 3))
    assert size_of(wal) == size_bytes
    model.save(wal, None, entries(24, 40))
    wal.close()
    assert state(reopen(disk)[1]) == model.history[-1]


def test_a_save_is_one_write_and_one_sync() -> None:
    disk = FaultyDisk()
    wal = create(disk, 1 << 20)
    disk.operations.clear()
    wal.save(HardState(1, 1, 1), entries(1, 100))
    assert [operation for operation, _ in disk.operations] == ["pwrite", "sync"]
    disk.operations.clear()
    wal.save(None, [])
    assert disk.operations == []


def test_without_fsync_nothing_is_synced() -> None:
    disk = FaultyDisk()
    wal = WAL.create(disk, FOLDER, b"", SEGMENT_BYTES, sync_enabled=False)
    for index in range(1, 40):
        wal.save(HardState(1, 1, index), [entry(index)])
    wal.mark_snapshot(39, 1)
    wal.release(39)
    wal, _ = WAL.open(disk, FOLDER, SEGMENT_BYTES, sync_enabled=False)
    assert wal.last_index == 39 and not wal.sync_enabled
    assert not {"sync", "sync_dir"} & {operation for operation, _ in disk.operations}


def test_a_save_too_large_for_a_segment_gets_one_of_its_own() -> None:
    disk, model = FaultyDisk(), Model()
    wal = create(disk)
    model.save(wal, None, [entry(1)])
    model.save(wal, None, [entry(2, size_bytes=5000)])
    model.save(wal, None, [entry(3)])
    assert (len(wal.segments), size_of(wal)) == (3, 1024 + 5632 + 1024)
    assert state(reopen(disk)[1]) == model.history[-1]


def test_a_save_over_the_limit_is_refused_and_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wal_module, "MAX_FRAME_BYTES", 4096)
    disk, model = FaultyDisk(), Model()
    wal = create(disk)
    with pytest.raises(ValueError, match="the limit is 4096"):
        wal.save(None, [entry(1, size_bytes=5000)])
    assert not wal.failed and wal.last_index == 0
    model.save(wal, None, [entry(1)])
    assert state(reopen(disk)[1]) == model.history[-1]


@pytest.mark.parametrize("first", [1, 3, 5, 6])
def test_an_entry_replaces_those_from_its_index_on(first: int) -> None:
    disk = FaultyDisk()
    wal = create(disk)
    wal.save(None, entries(1, 5))
    wal.save(None, [entry(first, 2)])
    assert wal.last_index == first
    assert reopen(disk)[1].entries == [*entries(1, first - 1), entry(first, 2)]


def test_entries_that_leave_a_gap_are_a_fault_of_the_caller() -> None:
    wal = create(FaultyDisk())
    wal.save(None, entries(1, 5))
    for wrong in ([entry(7)], [entry(6), entry(8)], [entry(0)]):
        with pytest.raises(AssertionError):
            wal.save(None, wrong)


def test_a_snapshot_from_the_leader_replaces_a_log_that_is_shorter_or_conflicts() -> None:
    for index, discard_log in ((9, False), (3, True)):
        disk = FaultyDisk()
        wal = create(disk)
        wal.save(None, entries(1, 5))
        wal.mark_snapshot(index, 2, discard_log=discard_log)
        assert wal.last_index == index
        assert reopen(disk)[1].entries == []
        wal.save(None, [entry(index + 1, 2)])
        assert reopen(disk)[1].entries == [entry(index + 1, 2)]


# Segments go when a snapshot covers them


def test_segments_that_a_snapshot_covers_are_removed_and_hard_state_survives() -> None:
    disk = FaultyDisk()
    wal = create(disk)
    wal.save(HardState(7, 3, 0), [])
    for index in range(1, 31):
        wal.save(None, [entry(index, size_bytes=200)])
    segments = len(wal.segments)
    assert segments > 10
    wal.mark_snapshot(15, 1)
    wal.release(10)
    after_ten = len(wal.segments)
    wal.release(15)
    assert segments > after_ten > len(wal.segments) > 1
    assert size_of(wal) == len(wal.segments) * SEGMENT_BYTES == 1024 * len(disk.list(FOLDER))
    wal, recovered = reopen(disk)
    assert recovered.hard_state == HardState(7, 3, 0)
    assert state(recovered) == (
        HardState(7, 3, 0), (15, 1), [entry(i, size_bytes=200) for i in range(16, 31)]
    )  # fmt: skip
    wal.mark_snapshot(30, 1)
    wal.release(30)
    assert len(wal.segments) == 1
    assert state(reopen(disk)[1]) == (HardState(7, 3, 0), (30, 1), [])


def test_a_segment_whose_newer_entries_were_replaced_can_go() -> None:
    disk = FaultyDisk()
    wal = create(disk)
    wal.save(None, entries(1, 8))
    wal.save(None, entries(3, 3, term=2, size_bytes=600))
    wal.mark_snapshot(2, 1)
    assert len(wal.segments) == 2
    wal.release(2)
    assert len(wal.segments) == 1
    wal, recovered = reopen(disk)
    assert recovered.entries == entries(3, 3, term=2, size_bytes=600)
    assert wal.last_index == 3


def test_segments_of_a_discarded_log_can_go() -> None:
    disk = FaultyDisk()
    wal = create(disk)
    for index in range(1, 6):
        wal.save(None, [entry(index, size_bytes=300)])
    wal.mark_snapshot(3, 2, discard_log=True)
    wal.release(3)
    assert len(wal.segments) == 1
    wal, recovered = reopen(disk)
    assert (wal.last_index, state(recovered)) == (3, (HardState(0, 0, 0), (3, 2), []))


# Damage


def assert_recovers_or_refuses(disk: FaultyDisk, history: list[State], what: str) -> bool:
    """One of the last two states, or WALDamaged that leaves the files alone. True: refused."""
    before = {name: disk.read(f"{FOLDER}/{name}") for name in disk.list(FOLDER)}
    try:
        recovered = reopen(disk)[1]
    except WALDamaged as error:
        assert error.path.startswith(FOLDER) and 0 <= error.offset <= len(before[error.path[-20:]])
        assert f"{error.path} is damaged at byte {error.offset}: " in str(error), what
        assert {name: disk.read(f"{FOLDER}/{name}") for name in before} == before, what
        return True
    assert state(recovered) in history[-2:], what
    again = reopen(disk)[1]
    assert (state(again), again.torn) == (state(recovered), None), what
    return False


def test_a_log_cut_at_any_byte_is_refused(is_sealed: bool) -> None:
    disk, model = FaultyDisk(), Model()
    write_history(create(disk), model)
    assert len(disk.list(FOLDER)) >= 2
    for name in disk.list(FOLDER):
        content = disk.read(f"{FOLDER}/{name}")
        for size_bytes in range(0, len(content), 7 if is_sealed else 1):
            cut = disk.copy()
            del cut.content(f"{FOLDER}/{name}")[size_bytes:]
            what = f"{name} cut to {size_bytes} bytes"
            assert assert_recovers_or_refuses(cut, model.history, what), what


def test_any_flipped_bit_is_found_or_harmless(is_sealed: bool) -> None:
    disk, model = FaultyDisk(), Model()
    wal = create(disk)
    model.save(wal, HardState(1, 2, 1), entries(1, 3))
    model.save(wal, None, [*entries(2, 5), entry(6, 1, 100)])
    model.mark_snapshot(wal, 2, 1)
    model.save(wal, None, entries(7, 8, size_bytes=90))
    model.save(wal, HardState(1, 2, 8), [entry(9), Entry(1, 10, 0, bytes(1200)), entry(11)])
    assert len(wal.segments) == 4
    refused = accepted = 0
    for name in disk.list(FOLDER):
        where = f"{FOLDER}/{name}"
        content = disk.read(where)
        used = len(content.rstrip(b"\0"))
        for bit in range(0, len(content) * 8, 13 if is_sealed else 1):
            flipped = disk.copy()
            flipped.content(where)[bit // 8] ^= 1 << bit % 8
            what = f"{name}: bit {bit % 8} of byte {bit // 8} flipped"
            if assert_recovers_or_refuses(flipped, model.history, what):
                refused += 1
            else:
                # What the checksums cover is always noticed; a stray bit after the end of the log
                # looks like a torn write, and going without that loses nothing.
                assert bit // 8 >= used and where == path(4), what
                accepted += 1
    assert refused > accepted


def test_a_sector_that_turned_to_zeros_is_damage_unless_it_is_of_the_last_save() -> None:
    disk, model = FaultyDisk(), Model()
    wal = create(disk, 1 << 14)
    for index in range(1, 8):
        model.save(wal, None, [entry(index, size_bytes=1300)])
    for sector in range(1, len(disk.read(path(1)).rstrip(b"\0")) // 512 + 1):
        wiped = disk.copy()
        wiped.content(path(1))[sector * 512 : sector * 512 + 512] = bytes(512)
        assert_recovers_or_refuses(wiped, model.history, f"sector {sector}")


def damaged(disk: FaultyDisk) -> WALDamaged:
    with pytest.raises(WALDamaged) as caught:
        reopen(disk)
    return caught.value


def three_segments() -> tuple[FaultyDisk, Model]:
    disk, model = FaultyDisk(), Model()
    wal = create(disk)
    for index in range(1, 4):
        model.save(wal, HardState(1, 1, index), [entry(index, size_bytes=300)])
    assert len(wal.segments) == 3
    return disk, model


def test_a_missing_segment_is_damage() -> None:
    disk, _ = three_segments()
    disk.unlink(path(2))
    error = damaged(disk)
    assert error.path == path(2) and "this segment is missing" in error.why
    assert "etcdlite-ctl snapshot restore" in str(error) and "member add" in str(error)


def test_a_missing_first_segment_is_damage_only_if_it_is_needed() -> None:
    disk, model = three_segments()
    released = disk.copy()
    disk.unlink(path(1))
    assert "with entry 1, are missing" in damaged(disk).why
    wal, _ = reopen(released)
    model.mark_snapshot(wal, 1, 1)
    released.unlink(path(1))
    assert state(reopen(released)[1]) == model.history[-1]


def test_a_sealed_segment_is_never_taken_for_torn() -> None:
    """Its last frame was synced before the next segment was made; zeros there are damage."""
    disk = FaultyDisk()
    wal = create(disk, 8192)
    for index in range(1, 4):
        wal.save(None, [entry(index, size_bytes=2000 * index)])
    assert len(wal.segments) == 2
    wiped = disk.copy()
    wiped.content(path(1))[4096:4608] = bytes(512)
    second_frame_at = 512 + 32 + 2048  # a record of 24 + 2000 bytes, padded
    assert (damaged(wiped).path, damaged(wiped).offset) == (path(1), second_frame_at)
    assert "checksum of frame 2" in damaged(wiped).why
    stray = disk.copy()
    stray.content(path(1))[8000] = 1
    assert (damaged(stray).path, damaged(stray).why) == (
        path(1),
        "bytes after the end, before byte 8001",
    )


def test_a_stray_byte_in_the_last_written_sector_is_damage() -> None:
    """No torn write looks like that: a sector arrives as a whole."""
    disk = FaultyDisk()
    create(disk, 8192).save(None, [entry(1)])
    disk.content(path(1))[1023] = 1
    error = damaged(disk)
    assert (error.offset, error.why) == (608, "bytes after the end, before byte 1024")


def test_a_missing_last_save_of_a_sealed_segment_is_damage() -> None:
    disk, _ = three_segments()
    disk.content(path(1))[512:] = bytes(512)
    error = damaged(disk)
    assert (error.path, error.offset) == (path(1), 512)
    assert "next segment begins with frame 2" in error.why


def test_a_segment_under_another_name_is_damage() -> None:
    disk, _ = three_segments()
    disk.open_new(path(4)).pwrite(bytes(disk.content(path(2))), 0)
    assert "this is segment 0000000000000002 under another name" in damaged(disk).why
    disk, _ = three_segments()
    disk.rename(path(3), path(9))
    disk.rename(path(2), path(3))
    disk.rename(path(9), path(2))
    assert "under another name" in damaged(disk).why


def test_a_segment_of_another_log_is_damage() -> None:
    disk, _ = three_segments()
    other, _ = three_segments()
    disk.content(path(3))[:] = other.read(path(3))
    error = damaged(disk)
    assert error.path == path(3) and "does not continue the one before it" in error.why


def test_an_empty_segment_is_damage_and_named() -> None:
    disk, _ = three_segments()
    del disk.content(path(3))[:]
    error = damaged(disk)
    assert (error.path, error.offset, error.why) == (path(3), 0, "the file is empty")


@pytest.mark.parametrize(
    ("kind_of_record", "size_bytes", "why"),
    [
        (1, 16 + 9, "a record passes the end of frame 2"),
        (9, 8, "record of unknown type 9"),
        (9, 0, "record of unknown type 9"),
    ],
)
def test_a_record_that_does_not_fit_its_frame_is_damage_although_all_checksums_match(
    kind_of_record: int, size_bytes: int, why: str
) -> None:
    disk = FaultyDisk()
    create(disk, 8192).save(None, [entry(1)])
    content = disk.content(path(1))
    salt = int.from_bytes(content[32:36], "little")
    chain = int.from_bytes(content[512 + 20 : 512 + 24], "little")
    body = bytes([kind_of_record, 0, 0, 0, size_bytes, 0, 0, 0]) + bytes(8) + b"\2" + bytes(15)
    crc = zlib.crc32(body, chain)
    frame = wal_module.frame_header(len(body), 2, salt, crc, 0) + body
    content[608 : 608 + len(frame)] = frame
    assert (damaged(disk).offset, damaged(disk).why) == (608, why)


def test_a_log_of_a_newer_version_is_refused_with_advice() -> None:
    disk, _ = three_segments()
    content = disk.content(path(1))
    content[8:12] = (7).to_bytes(4, "little")
    assert "checksum of the segment header" in damaged(disk).why
    content[508:512] = zlib.crc32(content[:508]).to_bytes(4, "little")
    with pytest.raises(WALVersionError) as caught:
        reopen(disk)
    assert caught.value.version == 7
    for part in (path(1), "version 7", "newer etcdlite", "snapshot restore"):
        assert part in str(caught.value)


def test_there_is_never_a_second_log_in_a_folder_and_none_is_no_damage() -> None:
    disk = FaultyDisk()
    disk.make_dir(FOLDER)
    with pytest.raises(FileNotFoundError):
        reopen(disk)
    create(disk)
    with pytest.raises(FileExistsError):
        create(disk)


# Power loss


def outcomes(disk: FaultyDisk) -> list[FaultyDisk]:
    """The disk after a loss of power with every subset of what was not synced."""
    unsynced = disk.unsynced()
    assert len(unsynced) <= 6, unsynced
    result = []
    for bits in itertools.product((False, True), repeat=len(unsynced)):
        kept = {what for what, bit in zip(unsynced, bits, strict=True) if bit}
        for names in range(disk.unsynced_names + 1):
            result.append(disk.power_loss(lambda *what, kept=kept: what in kept, names))  # type: ignore[misc]
    return result


PAYLOADS: dict[str, Callable[[int], bytes]] = {
    "text": lambda size: entry(2, size_bytes=size).data,
    "zeros": lambda size: bytes(size),
    "zeros around one byte": lambda size: bytes(size - size // 2) + b"\1" + bytes(size // 2 - 1),
    "zeros then text": lambda size: bytes(600) + b"x" * (size - 600),
    "text then zeros": lambda size: b"x" * (size - 600) + bytes(600),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_torn_write_is_all_there_or_all_gone(payload: str, is_sealed: bool) -> None:
    """Frames over 2 to 4 sectors from every place in a sector, and every subset of the sectors."""
    torn = 0
    step = 96 if is_sealed else 32
    for before, size_bytes in itertools.product(range(1, 513, step), (700, 1000, 1450)):
        disk, model = FaultyDisk(), Model()
        wal = create(disk, 8192)
        model.save(wal, None, [Entry(1, 1, 0, b"a" * before)])
        disk.fail_at = 2  # the write arrives, the sync does not return
        with pytest.raises(OSError):
            model.save(wal, None, [Entry(1, 2, 0, PAYLOADS[payload](size_bytes))])
        for after in outcomes(disk):
            wal, recovered = reopen(after)
            found = state(recovered)
            assert found in (model.history[-1], model.attempted), (before, size_bytes)
            torn += recovered.torn is not None
            assert recovered.torn is None or "was cut off by a crash" in recovered.torn
            # It is durable before it is returned, and the log can be written again.
            assert state(reopen(after.power_loss())[1]) == found
            wal.save(None, [entry(len(found[2]) + 1)])
            _, again = reopen(after.power_loss())
            assert again.entries == [*found[2], entry(len(found[2]) + 1)]
    assert torn


def test_a_crash_while_a_torn_write_is_removed_is_a_torn_write_again(is_sealed: bool) -> None:
    disk, model = FaultyDisk(), Model()
    wal = create(disk, 8192)
    model.save(wal, None, entries(1, 3, size_bytes=100))
    disk.fail_at = 2
    with pytest.raises(OSError):
        model.save(wal, None, [entry(4, size_bytes=1400)])
    crashes = 0
    for torn in outcomes(disk):
        for fail_at in itertools.count(1):
            crashed = torn.copy()
            crashed.fail_at = fail_at
            try:
                found = state(reopen(crashed)[1])
                break
            except OSError:
                for after in outcomes(crashed):
                    assert state(reopen(after)[1]) in (model.history[-1], model.attempted)
                    crashes += 1
        assert found in (model.history[-1], model.attempted)
    assert crashes > 100


def test_client_data_cannot_pass_for_a_frame() -> None:
    """Values that look like parts of the log do not make a torn write look like damage."""
    disk = FaultyDisk()
    create(disk, 1 << 14).save(None, [entry(1)])
    content = disk.read(path(1))
    salt = int.from_bytes(content[32:36], "little")
    old_frame = content[512:].rstrip(b"\0").ljust(96, b"\0")
    guessed_frame = wal_module.frame_header(32, 3, salt ^ 1, 0, 0)
    cut_off = 0
    for copies, shift in itertools.product((old_frame * 15, guessed_frame * 40), range(0, 32, 4)):
        attempt = disk.copy()
        wal, _ = reopen(attempt)
        attempt.fail_at = 2
        with pytest.raises(OSError):
            wal.save(None, [Entry(1, 2, 0, bytes(shift) + copies)])
        for after in outcomes(attempt):
            recovered = reopen(after)[1]
            assert len(recovered.entries) in ((1,) if recovered.torn else (1, 2))
            cut_off += recovered.torn is not None
    assert cut_off


# I/O errors


def run_until_error(disk: FaultyDisk, fail_at: int, error: int) -> tuple[Model, bool]:
    """The whole history with the n-th operation failing. Returns also whether it got to that."""
    disk.fail_at, disk.error = fail_at, error
    model = Model()
    model.attempted = NOTHING
    try:
        wal = create(disk)
    except OSError:
        return model, True
    try:
        write_history(wal, model)
    except OSError as caught:
        assert caught.errno == error
        operation, name = disk.operations[-1]
        is_frame = operation == "pwrite" and name.endswith(".wal")
        assert wal.failed == (error != errno.ENOSPC or not is_frame)
        if not wal.failed:
            return model, True
        operations = len(disk.operations)
        with pytest.raises(WALError):
            wal.save(HardState(9, 9, 9), [])
        with pytest.raises(WALError):
            wal.mark_snapshot(99, 9)
        assert len(disk.operations) == operations
        return model, True
    return model, False


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_io_error_at_any_operation_loses_nothing_that_was_acknowledged(
    error: int, is_sealed: bool
) -> None:
    random_bits = random.Random(error)
    for fail_at in itertools.count(1):
        disk = FaultyDisk()
        model, failed = run_until_error(disk, fail_at, error)
        if not failed:
            assert fail_at > 60, "the history has fewer operations than it should"
            break
        possible = [model.history[-1], model.attempted]
        found = [disk]
        found += [disk.power_loss(names=names) for names in range(disk.unsynced_names + 1)]
        found += [
            disk.power_loss(lambda path, sector: random_bits.random() < 0.5, disk.unsynced_names)
            for _ in range(10)
        ]
        for after in found:
            if not WAL.exists(after, FOLDER):
                assert model.history == [NOTHING], f"operation {fail_at}: the log is gone"
                create(after).close()
            wal, recovered = reopen(after)
            assert state(recovered) in possible, f"operation {fail_at}"
            assert not any(name.endswith(".tmp") for name in after.list(FOLDER))
            # Nobody acts on what could still be lost.
            durable = reopen(after.power_loss())[1]
            assert state(durable) == state(recovered), f"operation {fail_at}"
            wal.save(HardState(5, 5, 5), entries(wal.last_index + 1, wal.last_index + 30, term=5))
            assert reopen(after.power_loss())[0].last_index == wal.last_index


def test_a_frame_that_finds_no_space_in_its_reserved_space_can_be_saved_again(
    is_sealed: bool,
) -> None:
    """File systems that copy on write need space to overwrite what is reserved."""
    for other in (None, [entry(2, size_bytes=40), entry(3)]):
        disk, model = FaultyDisk(), Model()
        wal = create(disk, 4096)
        model.save(wal, HardState(1, 1, 1), [entry(1)])
        for _ in range(2):
            disk.fail_at, disk.error = 1, errno.ENOSPC
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                wal.save(None, [entry(2, size_bytes=300)])
        for after in (disk, disk.power_loss(lambda path, sector: True)):
            assert state(reopen(after.fork())[1]) == model.history[-1]
        model.save(wal, None, other or [entry(2, size_bytes=300)])
        model.save(wal, None, [entry(4 if other else 3)])
        for after in (disk, disk.power_loss()):
            assert state(reopen(after.fork())[1]) == model.history[-1]


def test_an_io_error_while_opening_changes_nothing_that_counts() -> None:
    disk, model = FaultyDisk(), Model()
    write_history(create(disk), model)
    for fail_at in itertools.count(1):
        attempt = disk.copy()
        attempt.fail_at = fail_at
        try:
            reopen(attempt)
        except OSError:
            assert state(reopen(attempt.power_loss())[1]) == model.history[-1]
            assert state(reopen(attempt)[1]) == model.history[-1]
        else:
            assert fail_at > 10
            break


def test_a_full_disk_shows_before_anything_is_written_to_the_new_segment() -> None:
    disk, model = FaultyDisk(), Model()
    wal = create(disk)
    model.save(wal, None, [entry(1, size_bytes=300)])
    disk.fail_at, disk.error = 2, errno.ENOSPC
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        model.save(wal, None, [entry(2, size_bytes=300)])
    assert [operation for operation, _ in disk.operations[-3:]] == ["create", "allocate", "unlink"]
    assert state(reopen(disk)[1]) == model.history[-1]


@pytest.mark.parametrize("left", [0, 1, 511, 1024])
def test_a_segment_that_a_crash_left_unfinished_is_removed(left: int) -> None:
    disk, model = three_segments()
    disk.open_new(path(4) + ".tmp").pwrite(disk.read(path(3))[:left], 0)
    wal, recovered = reopen(disk)
    assert (state(recovered), recovered.torn) == (model.history[-1], None)
    assert len(wal.segments) == 3 == len(disk.list(FOLDER))
    model.save(wal, None, [entry(4, size_bytes=300)])
    assert state(reopen(disk)[1]) == model.history[-1]


# Anything, in any order


class Log(RuleBasedStateMachine):
    """Random saves, replaced suffixes, snapshots, releases, restarts and losses of power."""

    keys: Keyring | None = None

    @initialize(segment_bytes=st.sampled_from([1024, 2048, 16384]))
    def begin(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.disk = FaultyDisk()
        self.model = Model()
        self.term = 1
        self.wal = WAL.create(self.disk, FOLDER, b"", segment_bytes, keys=self.keys)

    def new_entries(self, first: int, sizes: list[int], fill: int) -> list[Entry]:
        return [
            Entry(self.term, first + i, i & 1, bytes([fill]) * size) for i, size in enumerate(sizes)
        ]

    sizes = st.lists(st.integers(0, 700), max_size=5)

    @rule(sizes=sizes, fill=st.integers(0, 255), commit=st.none() | st.integers(0, 100))
    def append(self, sizes: list[int], fill: int, commit: int | None) -> None:
        hard_state = None if commit is None else HardState(self.term, fill, commit)
        new = self.new_entries(self.model.last_index + 1, sizes, fill)
        self.model.save(self.wal, hard_state, new)

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data(), sizes=sizes, fill=st.integers(0, 255))
    def replace_a_suffix(self, data: st.DataObject, sizes: list[int], fill: int) -> None:
        self.term += 1
        first = data.draw(st.integers(self.model.snapshot[0] + 1, self.model.last_index))
        self.model.save(self.wal, None, self.new_entries(first, sizes, fill))

    @rule(data=st.data())
    def take_a_snapshot(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(self.model.snapshot[0], self.model.last_index))
        self.model.mark_snapshot(self.wal, index, self.term)

    @rule(ahead=st.integers(0, 5))
    def receive_a_snapshot(self, ahead: int) -> None:
        self.term += 1
        index = self.model.snapshot[0] + ahead
        self.model.mark_snapshot(self.wal, index, self.term, discard_log=True)

    @rule()
    def release(self) -> None:
        self.wal.release(self.model.snapshot[0])

    @rule()
    def restart(self) -> None:
        self.wal.close()
        self.reopen([self.model.history[-1]])

    @rule()
    def lose_power(self) -> None:
        self.disk = self.disk.power_loss()
        self.reopen([self.model.history[-1]])

    @rule(
        sizes=sizes.filter(bool),
        fill=st.integers(0, 255),
        fail_at=st.integers(1, 8),
        seed=st.integers(0, 1 << 16),
    )
    def lose_power_while_saving(self, sizes: list[int], fill: int, fail_at: int, seed: int) -> None:
        random_bits = random.Random(seed)
        self.disk.fail_at = fail_at
        try:
            self.model.save(
                self.wal, None, self.new_entries(self.model.last_index + 1, sizes, fill)
            )
        except OSError:
            names = random_bits.randint(0, self.disk.unsynced_names)
            self.disk = self.disk.power_loss(lambda *_: random_bits.random() < 0.5, names)
            self.reopen([self.model.history[-1], self.model.attempted])
        self.disk.fail_at = None

    def reopen(self, possible: list[State]) -> None:
        self.wal, self.recovered = WAL.open(self.disk, FOLDER, self.segment_bytes, keys=self.keys)
        found = state(self.recovered)
        assert found in possible
        self.model.hard_state, self.model.snapshot, self.model.entries = found
        self.model.history.append(found)

    @invariant()
    def the_log_knows_its_end_and_size(self) -> None:
        assert self.wal.last_index == self.model.last_index
        assert self.wal.hard_state == self.model.hard_state
        assert len(self.wal.segments) == len(self.disk.list(FOLDER))
        assert size_of(self.wal) == sum(
            len(self.disk.read(f"{FOLDER}/{name}")) for name in self.disk.list(FOLDER)
        )


Log.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_the_log_behaves_like_a_list_under_any_sequence_of_events = Log.TestCase


class SealedLog(Log):
    """The same with keys that come and are replaced."""

    seeds: tuple[int, ...] = ()
    made = 0

    @rule()
    def a_key_is_put_first(self) -> None:
        self.made += 1
        self.seeds = (self.made, *self.seeds)
        self.keys = keyring(*self.seeds)
        self.restart()

    @precondition(lambda self: self.keys is not None)
    @rule(fail_at=st.none() | st.integers(1, 9), seed=st.integers(0, 1 << 16))
    def old_keys_are_dropped(self, fail_at: int | None, seed: int) -> None:
        """At a start, as `rekey` does; perhaps the power goes meanwhile."""
        self.restart()
        self.disk.fail_at = fail_at
        try:
            self.wal.replace_segments(self.recovered.entries)
            self.seeds = self.seeds[:1]
            self.keys = keyring(*self.seeds)
            self.restart()
        except OSError:
            random_bits = random.Random(seed)
            names = random_bits.randint(0, self.disk.unsynced_names)
            self.disk = self.disk.power_loss(lambda *_: random_bits.random() < 0.5, names)
            self.reopen([self.model.history[-1]])
        self.disk.fail_at = None


SealedLog.TestCase.settings = settings(Log.TestCase.settings, max_examples=50)
test_a_log_whose_keys_change_behaves_like_a_list = SealedLog.TestCase


def test_the_faulty_disk_can_lose_a_new_size() -> None:
    disk = FaultyDisk()
    disk.make_dir(FOLDER)
    file = disk.open_new(path(1))
    disk.sync_dir(FOLDER)
    file.pwrite(b"x" * 600, 0)
    assert disk.unsynced() == [(path(1), SIZE), (path(1), 0), (path(1), 1)]
    found = {after.read(path(1)) for after in outcomes(disk)}
    both, first, second = b"x" * 600, b"x" * 512 + bytes(88), bytes(512) + b"x" * 88
    assert found == {b"", bytes(600), both, first, second}
