"""The file of bbolt: what is written is read again, and a file that is damaged is refused."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdlite import bolt
from etcdlite.bolt import BoltError, Bucket, Reader

Items = dict[bytes, bytes]


def bucket(name: bytes, items: Items, slack: int = 0) -> Bucket:
    size = sum(len(key) + len(value) for key, value in items.items())
    most_key_bytes = max(map(len, items), default=0)
    return Bucket(name, parts(items), len(items) + slack, size + slack * 40, most_key_bytes)


def parts(items: Items) -> Iterator[bolt.Items]:
    """All items in order, in parts of several sizes."""
    keys = sorted(items)
    at = count = 0
    while at < len(keys):
        some = keys[at : at + count]
        yield some, [items[key] for key in some]
        at += count
        count = (count + 1) % 5


def written(buckets: dict[bytes, Items], slack: int = 0) -> bytes:
    size, parts = bolt.write([bucket(name, items, slack) for name, items in buckets.items()])
    data = b"".join(parts)
    assert len(data) == size
    return data


def read(data: bytes) -> dict[bytes, list[tuple[bytes, bytes]]]:
    reader = Reader(io.BytesIO(data), len(data))
    return {name: list(reader.items(place)) for name, place in reader.buckets().items()}


def ordered(buckets: dict[bytes, Items]) -> dict[bytes, list[tuple[bytes, bytes]]]:
    return {name: sorted(items.items()) for name, items in sorted(buckets.items())}


ITEMS = st.dictionaries(st.binary(max_size=40), st.binary(max_size=400), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.binary(min_size=1, max_size=9), ITEMS, max_size=5), st.integers(0, 3000))
def test_what_is_written_is_read(buckets: dict[bytes, Items], slack: int) -> None:
    assert read(written(buckets, slack)) == ordered(buckets)


@pytest.mark.parametrize("size", [0, 1, 100, 4000, 70_000, 3_000_000])
@pytest.mark.parametrize("count", [1, 3, 700, 40_000])
def test_trees_of_all_heights_are_read(count: int, size: int) -> None:
    if count * size > 20_000_000:
        size = 20_000_000 // count
    rng = random.Random(count * size)
    items = {b"%017d" % n: bytes(rng.randrange(size + 1)) for n in range(count)}
    buckets = {b"key": items, b"small": {b"a": b"b"}, b"zero": {}}
    data = written(buckets)
    assert read(data) == ordered(buckets)
    content = sum(16 + len(k) + len(v) for k, v in items.items())
    assert len(data) < content * 1.08 + 400_000, "the bounds are not close"


def test_branches_above_branches_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bolt, "MAX_CHILDREN", 3)
    monkeypatch.setattr(bolt, "LEAF_BYTES", 200)
    items = {b"%05d" % n: b"v" * (n % 50) for n in range(1000)}
    assert read(written({b"key": items})) == ordered({b"key": items})


class Draft:
    """A database page by page, as other writers may lay it out."""

    def __init__(self, page_bytes: int = 4096) -> None:
        self.page_bytes = page_bytes
        self.pages: list[bytes] = []

    def leaf(self, number: int, items: Iterable[tuple[bytes, bytes]], flags: int = 0) -> bytes:
        items = list(items)
        offset = 16 * len(items)
        table = content = b""
        for key, value in items:
            table += struct.pack("<IIII", flags, offset, len(key), len(value))
            content += key + value
            offset += len(key) + len(value) - 16
        size = 16 + len(table) + len(content)
        overflow = max(0, -(-size // self.page_bytes) - 1) if number else 0
        return struct.pack("<QHHI", number, 2, len(items), overflow) + table + content

    def branch(self, number: int, children: list[tuple[bytes, int]]) -> bytes:
        offset = 16 * len(children)
        table = content = b""
        for key, page in children:
            table += struct.pack("<IIQ", offset, len(key), page)
            content += key
            offset += len(key) - 16
        return struct.pack("<QHHI", number, 1, len(children), 0) + table + content

    def file(self, pages: list[bytes], root: int = 2, free_list: int = (1 << 64) - 1) -> bytes:
        padded = b"".join(
            page.ljust(-(-len(page) // self.page_bytes) * self.page_bytes, b"\0") for page in pages
        )
        count = 2 + len(padded) // self.page_bytes
        metas = b""
        for number, transaction in ((0, 8), (1, 7)):
            meta = struct.pack(
                "<IIIIQQQQQ",
                0xED0CDAED,
                2,
                self.page_bytes,
                0,
                root,
                0,
                free_list,
                count,
                transaction,
            )
            checksum = 0xCBF29CE484222325
            for byte in meta:
                checksum = (checksum ^ byte) * 0x100000001B3 % (1 << 64)
            page = struct.pack("<QHHI", number, 4, 0, 0) + meta + struct.pack("<Q", checksum)
            metas += page.ljust(self.page_bytes, b"\0")
        return metas + padded

    def root(self, *buckets: tuple[bytes, int, bytes]) -> bytes:
        return self.leaf(
            2, [(name, struct.pack("<QQ", page, 0) + inline) for name, page, inline in buckets], 1
        )


@pytest.mark.parametrize("page_bytes", [512, 4096, 16384, 65536])
@pytest.mark.parametrize("damaged", [None, 0, 1])
def test_other_layouts_are_read(page_bytes: int, damaged: int | None) -> None:
    """Pages of other sizes, inline buckets, overflow, a stored free list, and free pages with old
    content; and one meta page is enough."""
    draft = Draft(page_bytes)
    inline = draft.leaf(0, [(b"a", b"1"), (b"b", b"")])
    large = draft.leaf(5, [(b"m", b"v" * 150_000), (b"n", b"w")])
    pages = [
        draft.root((b"in", 0, inline), (b"key", 3, b"")),
        draft.branch(3, [(b"c", 4), (b"m", 5)]),
        draft.leaf(4, [(b"c", b"1"), (b"d", b"2")]),
        large,
    ]
    free = 5 + -(-len(large) // page_bytes)
    pages.append(draft.leaf(free, [(b"old", b"content")]))
    pages.append(struct.pack("<QHHIQ", free + 1, 16, 1, 0, free))
    data = bytearray(draft.file(pages, free_list=free + 1))
    if damaged is not None:
        data[damaged * page_bytes + 16 + 30] ^= 1
    assert read(bytes(data)) == {
        b"in": [(b"a", b"1"), (b"b", b"")],
        b"key": [(b"c", b"1"), (b"d", b"2"), (b"m", b"v" * 150_000), (b"n", b"w")],
    }


def refusal(data: bytes) -> str:
    with pytest.raises(BoltError) as refused:
        read(data)
    return str(refused.value)


def test_trees_that_are_none_are_refused_with_the_page() -> None:
    draft = Draft()
    key = draft.root((b"key", 3, b""))

    def tree(*pages: bytes) -> bytes:
        return draft.file([key, *pages])

    a, c = draft.leaf(4, [(b"a", b"")]), draft.leaf(5, [(b"c", b"")])
    assert refusal(tree(draft.branch(3, [(b"a", 3)]))) == "page 3 is part of the database twice"
    assert (
        refusal(tree(draft.branch(3, [(b"a", 4), (b"b", 4)]), a))
        == "page 4 is part of the database twice"
    )
    assert refusal(tree(draft.branch(3, [(b"a", 9)]))).startswith("page 9 is referred to")
    assert refusal(tree(draft.branch(3, [(b"a", 1)]))).startswith("page 1 is referred to")
    assert refusal(tree(draft.branch(3, []))) == "page 3 cannot have 0 elements"
    assert refusal(tree(draft.branch(3, [(b"b", 4)]), a)) == "page 4: its keys are not in order"
    assert (
        refusal(tree(draft.branch(3, [(b"c", 5), (b"d", 4)]), a, c))
        == "page 4: its keys are not in order"
    )
    assert (
        refusal(tree(draft.leaf(3, [(b"a", b""), (b"a", b"")])))
        == "page 3: its keys are not in order"
    )
    assert (
        refusal(tree(draft.leaf(3, [(b"a", bytes(16))], 1)))
        == "page 3: there is a bucket within a bucket"
    )
    assert (
        refusal(draft.file([draft.leaf(2, [(b"key", b"")])]))
        == "page 2: an element of the root is not a bucket"
    )
    assert refusal(draft.file([draft.root((b"key", 0, b""))])) == "page 0 ends inside its header"
    assert refusal(tree(draft.leaf(4, []))).startswith("page 3 is no page of a bucket: number 4")
    deep = [draft.branch(n, [(b"", n + 1)]) for n in range(3, 60)]
    assert refusal(tree(*deep, draft.leaf(60, []))) == "page 42: the tree is too deep"
    wide = bytearray(draft.leaf(3, [(b"a", b"x" * 100), (b"b", b"x" * 100)]))
    wide[20:24] = struct.pack("<I", 16)
    assert refusal(tree(bytes(wide))) == "page 3: element 0 is damaged"
    far = draft.leaf(3, [])[:12] + struct.pack("<I", 1000)
    assert refusal(tree(far)) == "page 3 reaches past the end of the file"


def test_files_that_are_none_are_refused() -> None:
    data = written({b"key": {b"a": b"1"}})
    assert refusal(b"") == refusal(b"x" * 100_000) == "it is not a database of bbolt"
    assert refusal(data[:-1]).endswith("it was cut")
    both = bytearray(data)
    both[60] ^= 1
    both[4096 + 60] ^= 1
    assert refusal(bytes(both)) == "its meta pages do not match their checksums"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_changed_is_read_or_refused(data: st.DataObject) -> None:
    items = {b"%03d" % n: b"v" * (n % 60) for n in range(300)}
    file = bytearray(written({b"key": items, b"lease": {b"1": b"2"}, b"none": {}}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1))
        file[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    try:
        found = read(bytes(file[: len(file) - cut * 4096]))
    except BoltError:
        return
    assert sum(len(k) + len(v) for items in found.values() for k, v in items) <= len(file)
