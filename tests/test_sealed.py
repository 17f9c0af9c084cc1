"""Encryption at rest: the formats, what a change of a file by others does, and how keys change."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest
from rigs.faulty_disk import FaultyDisk
from rigs.keys import keyring
from rigs.member_rig import CLUSTER_ID, DATA_DIR, MEMBER_ID, MemberRig
from rigs.store_rig import DIRECTORY, SMALL_LIMITS, StoreRig

from etcdlite import keys, proto, sealing
from etcdlite.datadir import Home, StartError
from etcdlite.lease import Lessor
from etcdlite.mvcc import Store
from etcdlite.raft import HardState
from etcdlite.raft_log import Entry
from etcdlite.sealing import KeyFileError, Keyring
from etcdlite.storage.data import DataFile
from etcdlite.storage.disk import Disk
from etcdlite.storage.layout import DataAltered, KeyMissing
from etcdlite.storage.sealed import PAGE_BYTES, SealedDisk
from etcdlite.wal import WAL, WALDamaged, WALKeyMissing

bindings = pytest.importorskip("nacl.bindings", reason="pynacl is not installed")

SEGMENT = f"{DIRECTORY}/{1:016x}.seg"
OWNER = b"cluster+member ="
VALUE = b"a value that nobody should read"


def secret(seed: int) -> bytes:
    """The bytes of the key that `keyring` makes of `seed`."""
    import random

    return random.Random(seed).randbytes(32)


def opened(sealed: bytes, place: bytes, seed: int = 1) -> bytes:
    """As any program with libsodium opens a sealed piece."""
    return bytes(
        bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
            sealed[24:], place, sealed[:24], secret(seed)
        )
    )


def new_data(owner: bytes = OWNER, keys: Keyring | None = None) -> DataFile:
    disk = FaultyDisk()
    disk.make_dir(DIRECTORY)
    data = DataFile(SealedDisk(disk, keys or keyring(1), owner), DIRECTORY, 1 << 20)
    data.roll()
    return data


def filled(data: DataFile, records: int = 40) -> dict[int, bytes]:
    """Some pages of records. Returns them by location."""
    written = {}
    for number in range(records):
        body = b"%d" % number * 200
        written[data.append(1, body)] = body
    data.append_mark(1, 1, 1)
    data.flush()
    data.fill_page(1, 1, 1)
    return written


def inner(data: DataFile) -> FaultyDisk:
    disk = data.disk
    assert isinstance(disk, SealedDisk) and isinstance(disk.inner, FaultyDisk)
    return disk.inner


def reopened(disk: FaultyDisk, owner: bytes = OWNER, keys: Keyring | None = None) -> DataFile:
    data = DataFile(SealedDisk(disk, keys or keyring(1), owner), DIRECTORY, 1 << 20)
    data.open_segments()
    return data


# The formats.


def test_a_second_reader_of_sealed_files_can_be_written_from_the_docstring() -> None:
    data = new_data()
    data.append(1, VALUE * 200)
    data.append_mark(1, 2, 3)
    data.flush()
    data.roll()
    content = bytes(inner(data).content(SEGMENT))
    magic, version, number, key_id, crc, _, crc_of_all = struct.unpack_from("<8sIQ8sI16sI", content)
    assert (magic, version, number) == (b"ETCDLSEG", 2, 1)
    assert key_id == bindings.crypto_generichash_blake2b_salt_personal(
        b"", 8, key=secret(1), person=b"etcdlite key id"
    )
    assert (crc, crc_of_all) == (crc32(content[:28]), crc32(content[:48]))
    assert content[52:4096] == bytes(4096 - 52)
    plain = b""
    for page, at in enumerate(range(4096, len(content), 4096)):
        block = content[at : at + 4096]
        assert int.from_bytes(block[:4], "little") == crc32(block[4:])
        place = b"etcdlite page" + OWNER + content[:48] + struct.pack("<Q", page)
        plain += opened(block[4:], place)
    assert len(plain) == data.sizes[1] and len(plain) % 4052
    assert plain[:20] == b"ETCDLSEG" + struct.pack("<IQ", 1, 1)
    assert plain[32 + 8 :].startswith(VALUE * 200)


def test_a_second_reader_of_a_sealed_log_can_be_written_from_the_docstring() -> None:
    disk = FaultyDisk()
    log = WAL.create(disk, "wal", b"metadata", 4096, keys=keyring(1))
    log.save(HardState(7, 8, 0), [Entry(7, 1, 0, VALUE)])
    content = bytes(disk.content(f"wal/{1:016x}.wal"))
    assert content[:12] == b"etcdlWAL" + struct.pack("<I", 2)
    header_bytes = struct.unpack_from("<I", content, 12)[0]
    sealed_bytes = struct.unpack_from("<I", content, 56)[0]
    sealed = content[60 : 60 + sealed_bytes]
    text = opened(sealed, b"etcdlite log segment" + content[:60])
    assert text == struct.pack("<QQQQQQI", 0, 0, 0, 0, 0, 0, 8) + b"metadata"
    assert struct.unpack_from("<I", content, header_bytes - 4)[0] == crc32(
        content[: header_bytes - 4]
    )
    magic, length, sequence = struct.unpack_from("<4sIQ", content, header_bytes)
    assert (magic, sequence, length % 32) == (b"WALf", 1, 0)
    body = content[header_bytes + 32 : header_bytes + 32 + length]
    place = b"etcdlite log frame" + sealed[-16:] + struct.pack("<QQ", sequence, header_bytes)
    records = opened(body, place)
    assert records.startswith(struct.pack("<BBHIQQQ", 2, 0, 0, 24, 7, 8, 0))
    assert VALUE in records


def test_no_key_writes_the_same_bytes_as_ever() -> None:
    rig = StoreRig()
    rig.put(b"key", VALUE)
    rig.checkpoint()
    content = bytes(rig.disk.content(SEGMENT))
    assert content[8:12] == b"\1\0\0\0" and VALUE in content
    assert rig.store.data.offset == len(content) < 200, "something was filled up"


def test_nothing_readable_reaches_the_disk_and_no_nonce_comes_twice() -> None:
    disk = FaultyDisk()
    rig = MemberRig(disk, limits=SMALL_LIMITS, keys=keyring(1), checkpoint_bytes=1)
    rig.settle()
    written = set()

    def look() -> None:
        written.update(bytes(disk.read(name)) for name in disk.paths)

    for number in range(80):
        rig.ask(proto.PutRequest(key=b"secret key %d" % (number % 7), value=VALUE * (number % 4)))
        if number % 20 == 10:
            rig.ask(proto.CompactionRequest(revision=rig.story.model.revision - 3))
            rig.ask(proto.DefragmentRequest())
        rig.tick()
        look()
    rig.close()
    look()
    assert rig.member.maintenance.cleaned_segments and rig.member.maintenance.checkpoints > 3
    blocks: dict[bytes, bytes] = {}
    for content in written:
        assert VALUE not in content and b"secret key" not in content
        if content[:8] in (b"ETCDLSEG", b"ETCDLCHK"):
            for at in range(4096, len(content), 4096):
                block = content[at : at + 4096]
                assert blocks.setdefault(block[4:28], block) == block, "a nonce came twice"
    assert len(blocks) > 30


# What others do to the files.


def test_a_page_of_another_place_is_refused() -> None:
    ring = keyring(1)
    data, other, stranger = (new_data(owner, ring) for owner in (OWNER, OWNER, b"another member.."))
    written = filled(data)
    filled(other)
    filled(stranger)
    pages = len(inner(data).content(SEGMENT)) // 4096 - 1
    assert pages > 2
    for page in range(pages):
        for source, from_page in ((data, (page + 1) % pages), (other, page), (stranger, page)):
            disk = inner(data).copy()
            at, from_at = 4096 * (1 + page), 4096 * (1 + from_page)
            block = inner(source).content(SEGMENT)[from_at : from_at + 4096]
            disk.content(SEGMENT)[at : at + 4096] = block
            refused = 0
            for location, body in written.items():
                try:
                    assert reopened(disk).read(location, len(body)) == body
                except DataAltered as failure:
                    assert failure.path == SEGMENT and "another place" in str(failure)
                    refused += 1
            assert refused


def test_a_file_of_another_member_or_another_name_is_refused() -> None:
    data = new_data()
    (location, body), *_ = filled(data).items()
    assert reopened(inner(data).copy()).read(location, len(body)) == body
    with pytest.raises(DataAltered):
        reopened(inner(data).copy(), owner=b"another member..").read(location, len(body))
    disk = inner(data).copy()
    disk.rename(SEGMENT, f"{DIRECTORY}/{2:016x}.seg")
    with pytest.raises(DataAltered, match="another file under this name"):
        reopened(disk)


def test_a_forged_page_is_refused_at_the_start_and_not_taken_for_a_torn_one() -> None:
    rig = StoreRig(segment_bytes=1 << 16, keys=keyring(1))
    rig.checkpoint()
    for number in range(100):
        rig.put(b"key%d" % number, VALUE)
    rig.checkpoint()
    rig.put(b"more", VALUE * 300)
    disk = rig.disk.copy()
    content = disk.content(SEGMENT)
    content[-4000] ^= 1
    at = len(content) - 4096
    content[at : at + 4] = struct.pack("<I", crc32(content[at + 4 :]))
    before = bytes(content)
    with pytest.raises(DataAltered):
        rig.reopen(disk)
    assert disk.content(SEGMENT) == before
    # With a wrong checksum it is what a crash may leave behind the checkpoint.
    content[at] ^= 1
    rig.reopen(disk)
    assert rig.store.cut is not None
    rig.check()


def test_a_frame_of_another_log_is_damage() -> None:
    disks = []
    ring = keyring(1)
    for _ in range(2):
        disk = FaultyDisk()
        log = WAL.create(disk, "wal", b"", 4096, keys=ring)
        log.save(None, [Entry(1, 1, 0, VALUE)])
        disks.append(disk)
    path = f"wal/{1:016x}.wal"
    one, other = disks[0].content(path), disks[1].content(path)
    # Salt and checksums are no secret.
    salt = bytes(one[32:36])
    frame = bytearray(other[512:].rstrip(b"\0"))
    frame[16:20] = salt
    frame[28:32] = struct.pack("<I", crc32(frame[:28]))
    one[512:] = bytes(frame).ljust(len(one) - 512, b"\0")
    with pytest.raises(WALDamaged, match="altered, or put there from another place"):
        WAL.open(disks[0], "wal", 4096, keys=keyring(1))


def test_a_forged_segment_header_of_the_log_is_damage() -> None:
    disk = FaultyDisk()
    WAL.create(disk, "wal", b"", 4096, keys=keyring(1)).close()
    content = disk.content(f"wal/{1:016x}.wal")
    content[40] ^= 4
    content[508:512] = struct.pack("<I", crc32(content[:508]))
    with pytest.raises(WALDamaged, match="header was altered"):
        WAL.open(disk, "wal", 4096, keys=keyring(1))


# Keys that are missing, come and go.


def sealed_member(*seeds: int) -> FaultyDisk:
    rig = MemberRig(limits=SMALL_LIMITS, keys=keyring(*seeds))
    rig.settle()
    rig.ask(proto.PutRequest(key=b"key", value=VALUE))
    rig.close()
    return rig.disk  # type: ignore[return-value]


def contents(disk: FaultyDisk) -> dict[str, bytes]:
    return {path: disk.read(path) for path in disk.paths}


@pytest.mark.parametrize("given", [None, (2,), (3, 2)])
def test_a_missing_key_is_refused_before_anything_is_touched(given: tuple[int, ...] | None) -> None:
    disk = sealed_member(1)
    before = contents(disk)
    ring = keyring(*given) if given else None
    needed = keyring(1).first.id.hex()
    with pytest.raises(StartError) as refused:
        keys.check(Home(disk, DATA_DIR, keys=ring))
    assert f"it needs {needed}, but" in str(refused.value)
    for key_id in ring.ids if ring else ():
        assert key_id.hex() in str(refused.value)
    with pytest.raises(WALKeyMissing, match=needed):
        MemberRig(disk, keys=ring)
    with pytest.raises(KeyMissing, match=needed):
        store_disk = SealedDisk(disk, ring) if ring else disk
        Store.open(store_disk, f"{DATA_DIR}/member/data", Lessor(), 1 << 16)
    with pytest.raises(KeyMissing, match=needed):
        DataFile(disk, f"{DATA_DIR}/member/data", 1 << 16).open_segments() or (
            opened_plain(disk).check_header(1)
        )
    assert contents(disk) == before


def opened_plain(disk: Disk) -> DataFile:
    data = DataFile(disk, f"{DATA_DIR}/member/data", 1 << 16)
    data.open_segments()
    return data


def key_ids(disk: Disk) -> set[bytes | None]:
    return {use.key_id for use in keys.uses(Home(disk, DATA_DIR))}


def test_a_plain_member_that_gets_a_key_seals_what_it_writes_and_rekey_the_rest() -> None:
    rig = MemberRig(limits=SMALL_LIMITS, checkpoint_bytes=1)
    rig.settle()
    for number in range(30):
        rig.ask(proto.PutRequest(key=b"key%d" % number, value=VALUE))
    rig.close()
    disk, story, ring = rig.disk, rig.story, keyring(1)
    assert isinstance(disk, FaultyDisk)
    rig = MemberRig(disk, story, limits=SMALL_LIMITS, keys=ring)
    rig.settle()
    rig.ask(proto.PutRequest(key=b"later", value=b"only encrypted"))
    rig.close()
    assert key_ids(disk) == {None, ring.first.id}
    assert any(VALUE in content for content in contents(disk).values())
    assert not any(b"only encrypted" in content for content in contents(disk).values())
    with pytest.raises(StartError, match="no key was given"):
        keys.check(Home(disk, DATA_DIR))
    assert keys.replace(Home(disk, DATA_DIR, keys=ring)) > 2
    assert key_ids(disk) == {ring.first.id}
    assert not any(VALUE in content for content in contents(disk).values())
    assert keys.replace(Home(disk, DATA_DIR, keys=ring)) == 0, "it was done already"
    rig = MemberRig(disk, story, limits=SMALL_LIMITS, keys=ring)
    rig.settle()
    story.check(rig.member.state.store)


def test_keys_are_replaced_one_by_one() -> None:
    disk = sealed_member(1)
    for new, old in ((2, 1), (3, 2)):
        ring = keyring(new, old)
        rig = MemberRig(disk, limits=SMALL_LIMITS, keys=ring)
        rig.settle()
        rig.close()
        assert key_ids(disk) <= set(ring.ids)
        keys.replace(Home(disk, DATA_DIR, keys=ring))
        assert key_ids(disk) == {ring.first.id}
        keys.check(Home(disk, DATA_DIR, keys=keyring(new)))
    store = MemberRig(disk, keys=keyring(3)).member.state.store
    assert VALUE in (store.get(b"key") or b"")


@pytest.mark.parametrize("was_sealed", [False, True])
def test_a_crash_at_any_step_of_rekey_leaves_a_member_that_starts(was_sealed: bool) -> None:
    old = keyring(1) if was_sealed else None
    rig = MemberRig(limits=SMALL_LIMITS, keys=old, checkpoint_bytes=800)
    rig.settle()
    for number in range(9):
        rig.ask(proto.PutRequest(key=b"key%d" % (number % 4), value=VALUE * (number % 5)))
        if number < 7:
            rig.tick()
    # Without a last checkpoint: some entries are in the log alone.
    rig.member.state.store.close()
    rig.wal.close()
    assert isinstance(rig.disk, FaultyDisk)
    steps = 0
    ring = keyring(2, 1)
    while True:
        disk = rig.disk.fork()
        disk.fail_at = steps + 1
        try:
            keys.replace(Home(disk, DATA_DIR, keys=ring, wal_segment_bytes=2048))
            break
        except OSError:
            pass
        steps += 1
        for after in (disk.fork(), disk.power_loss(), disk.power_loss(names=disk.unsynced_names)):
            again = MemberRig(after, rig.story.fork(rig.story.acknowledged), keys=ring)
            again.settle()
            again.story.check(again.member.state.store)
    disk.fail_at = None
    assert steps > 30, steps
    assert key_ids(disk) == {ring.first.id}
    after = MemberRig(disk, rig.story, keys=keyring(2))
    after.settle()
    rig.story.check(after.member.state.store)


def test_rekey_does_not_guess_about_a_page_that_cannot_be_read() -> None:
    disk = sealed_member(1)
    path = f"{DATA_DIR}/member/data/{1:016x}.seg"
    disk.content(path)[5000] ^= 1
    before = disk.read(path)
    with pytest.raises(StartError, match="start the member, stop it"):
        keys.replace(Home(disk, DATA_DIR, keys=keyring(2, 1)))
    assert disk.read(path) == before


def test_rekey_completes_an_interrupted_installation_of_a_snapshot() -> None:
    disk = sealed_member(1)
    directory = f"{DATA_DIR}/member"
    disk.rename(f"{directory}/data", f"{directory}/data.old")
    disk.sync_dir(directory)
    # The log has no marker of it, so it is not installed but dropped; the data is missing.
    keys.replace(Home(disk, DATA_DIR, keys=keyring(2, 1)))
    assert not disk.exists(f"{directory}/data.old")


def test_files_are_bound_to_the_member() -> None:
    disk = sealed_member(1)
    data = f"{DATA_DIR}/member/data"
    home = Home(disk, DATA_DIR, keys=keyring(1))
    own = home.data_disk(CLUSTER_ID, MEMBER_ID)
    Store.open(own, data, Lessor(), 1 << 16).close()
    for other in ((CLUSTER_ID, MEMBER_ID + 1), (CLUSTER_ID + 1, MEMBER_ID)):
        with pytest.raises(DataAltered):
            Store.open(home.data_disk(*other), data, Lessor(), 1 << 16)


def test_a_reader_sees_what_waits_in_memory() -> None:
    """A snapshot of the store is read while the store goes on."""
    data = new_data()
    written = filled(data, 30)
    more = {data.append(1, b"not a page yet"): b"not a page yet"}
    data.flush()
    reader = data.disk.open_read(SEGMENT)
    size = data.flushed
    assert reader.size() == size
    later = {data.append(1, b"later" * 2000): b"later" * 2000}
    data.flush()
    content = reader.pread(size, 0)
    assert len(content) == size
    for location, body in (written | more).items():
        at = (location & 0xFFFFFFFF) + 8
        assert content[at : at + len(body)] == body
    data.roll()
    for location, body in (written | more | later).items():
        assert reopened(inner(data)).read(location, len(body)) == body


@pytest.mark.parametrize("size_bytes", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, 3 * PAGE_BYTES, 20_000])
def test_a_sealed_file_reads_like_a_plain_one(size_bytes: int) -> None:
    disk = FaultyDisk()
    disk.make_dir(DIRECTORY)
    sealed = SealedDisk(disk, keyring(1))
    file = sealed.create(SEGMENT, b"")
    content = os.urandom(size_bytes)
    at = 0
    while at < size_bytes:
        file.pwrite(content[at : at + 700], at)
        at += len(content[at : at + 700])
    for read in (file, sealed.open_read(SEGMENT)):
        assert read.size() == size_bytes
        for offset in range(0, size_bytes + 10, 501):
            for size in (0, 1, 700, 9000):
                assert read.pread(size, offset) == content[offset : offset + size]
    file.finish()
    file.close()
    cold = SealedDisk(disk, keyring(1)).open(SEGMENT)
    assert cold.size() == size_bytes and cold.pread(1 << 20, 0) == content
    for cut in (size_bytes - 1, size_bytes // 2, PAGE_BYTES, 1):
        if 0 < cut < cold.size():
            cold.truncate(cut)
            assert cold.size() == cut and cold.pread(1 << 20, 0) == content[:cut]
            assert SealedDisk(disk, keyring(1)).open(SEGMENT).pread(1 << 20, 0) == content[:cut]


# The file of keys.


def write_key_file(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def test_a_file_of_keys_is_read(tmp_path: Path) -> None:
    lines = [sealing.new_key() for _ in range(3)]
    text = "# comment\n\n" + "".join(line for _, line in lines)
    ring = sealing.read(write_key_file(tmp_path / "keys", text))
    assert ring.ids == [key_id for key_id, _ in lines]
    assert ring.first.id == lines[0][0]
    assert lines[0][0].hex() in repr(ring.first) and "etcdlite-key" not in repr(ring.first)


GOOD = "etcdlite-key-1:" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=" + "\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has 0 keys"),
        ("# nothing\n", "has 0 keys"),
        (GOOD, "not random"),
        ("etcdlite-key-1:" + "A" * 43 + "=\n", "not random"),
        ("etcdlite-key-1:AAAA\n", "line 1"),
        ("etcdlite-secret-1:" + sealing.PREFIX + "\n", "line 1"),
        ("\u00e4\u00f6\n", "line 1"),
        ("x" * 20_000, "more than 16384 bytes"),
    ],
)
def test_a_bad_file_of_keys_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(KeyFileError, match=why) as refused:
        sealing.read(write_key_file(tmp_path / "keys", text))
    assert "encryption-key-file" in str(refused.value)
    assert not text.strip() or text.strip() not in str(refused.value)


def test_a_secret_of_connections_is_no_key(tmp_path: Path) -> None:
    line = sealing.new_key()[1].replace("etcdlite-key-1:", "etcdlite-secret-1:")
    with pytest.raises(KeyFileError, match="it is not etcdlite-key-1"):
        sealing.read(write_key_file(tmp_path / "keys", line))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    line = sealing.new_key()[1]
    with pytest.raises(KeyFileError, match=r"line 3 .*twice"):
        sealing.read(write_key_file(tmp_path / "keys", line + sealing.new_key()[1] + line))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_of_keys_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    write_key_file(path, sealing.new_key()[1]).encode()
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        sealing.read(str(path))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path), lambda path: None])
def test_no_file_of_keys_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "keys")
    with pytest.raises(KeyFileError, match="keys"):
        sealing.read(str(tmp_path / "keys"))
