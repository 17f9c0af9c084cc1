"""The file of bbolt, the B+tree store below etcd: written as a stream, and read with checks.

The file, all integers little-endian. It consists of pages; page n begins at n * page size.

    page header, 16 bytes
        0   8  number of the page
        8   2  type: 1 branch, 2 leaf, 4 meta, 16 free list
        10  2  number of elements; at most 65,535
        12  4  overflow: how many further pages belong to this one
    meta page, after the header: pages 0 and 1
        0   4  magic 0xED0CDAED
        4   4  version, 2
        8   4  page size in bytes
        12  4  0
        16  8  the page of the root bucket
        24  8  its sequence
        32  8  the page of the free list; 2**64 - 1: none is stored
        40  8  number of pages in use: every page has a lower number
        48  8  transaction
        56  8  FNV-1a, 64 bit, of bytes 0 to 55
    leaf element, 16 bytes each after the header: flags u32 (1: the value is a bucket), offset of
        the key from the beginning of the element u32, length of the key u32, of the value u32. The
        value follows the key.
    branch element, 16 bytes each: offset of the key u32, length of the key u32, page u64. The key
        is the first one of that page.
    value that is a bucket: page u64, sequence u64. Page 0: a leaf page follows, in the value.

The valid meta page of the larger transaction counts. Keys of a bucket ascend.

**Writing** begins with the meta pages, before the number of pages is known. So each bucket gets as
many pages as it can need at most, from bounds of its size. Its root stands at the end of them,
where the list of buckets finds it, and pages between its last leaf and its root stay empty. Bbolt
sees such pages as free: it searches a file without a free list for them. Leaves have `LEAF_BYTES`
instead of one page, so that the bounds are close, at most about 6% above the size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import add, sub
from typing import Any, NamedTuple

MAGIC = 0xED0CDAED
VERSION = 2
PAGE_BYTES = 4096
"""The size of the pages that are written."""

BRANCH, LEAF, META = 1, 2, 4
IS_BUCKET = 1
NO_FREE_LIST = (1 << 64) - 1

PAGE_HEADER = struct.Struct("<QHHI")
_META = struct.Struct("<IIIIQQQQQ")
_U64 = struct.Struct("<Q")
BUCKET_VALUE = struct.Struct("<QQ")
LEAF_ELEMENT = struct.Struct("<IIII")
BRANCH_ELEMENT = struct.Struct("<IIQ")
ELEMENT_BYTES = 16
assert LEAF_ELEMENT.size == BRANCH_ELEMENT.size == PAGE_HEADER.size == ELEMENT_BYTES

LEAF_BYTES = 64 << 10
"""A leaf with at least this much is complete."""

EMPTY_PAGES = 16
"""The most empty pages in one piece."""

MAX_CHILDREN = 512
"""Pages below one branch page."""

MAX_ITEMS = 32_768
"""The most items that `Bucket.items` gives at once."""

assert LEAF_BYTES // ELEMENT_BYTES + MAX_ITEMS < 1 << 16


def _fnv1a(data: bytes) -> int:
    result = 0xCBF29CE484222325
    for byte in data:
        result = (result ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return result


# Writing.

Items = tuple[Sequence[bytes], Sequence[bytes]]
"""Keys and their values."""


class Bucket(NamedTuple):
    name: bytes
    items: Iterator[Items]
    """Its keys and values, keys ascending, up to `MAX_ITEMS` at once. There is a pause after each
    part, which may be empty."""
    most_items: int
    most_bytes: int
    """Upper bounds: the number of items, and the sum of their keys and values."""
    most_key_bytes: int


def write(buckets: Sequence[Bucket]) -> tuple[int, Iterator[bytes]]:
    """The size of the file of these buckets, and its content in pieces of about `LEAF_BYTES` (and
    single items larger than that), to be taken once. An empty piece is a pause."""
    ordered = sorted(buckets, key=lambda bucket: bucket.name)
    root_pages = _pages(sum(len(b.name) + BUCKET_VALUE.size + ELEMENT_BYTES for b in ordered))
    trees = []
    at = 2 + root_pages
    for bucket in ordered:
        tree = _Tree(bucket, at)
        at += tree.pages
        trees.append(tree)
    return at * PAGE_BYTES, _content(trees, root_pages, at)


def _content(trees: list[_Tree], root_pages: int, pages: int) -> Iterator[bytes]:
    yield _meta_page(0, 2, pages) + _meta_page(1, 3, pages)
    names = [tree.bucket.name for tree in trees]
    values = [BUCKET_VALUE.pack(tree.root, 0) for tree in trees]
    yield _leaf(2, root_pages, names, values, IS_BUCKET)
    for tree in trees:
        yield from tree.content()


def _meta_page(number: int, transaction: int, pages: int) -> bytes:
    meta = _META.pack(MAGIC, VERSION, PAGE_BYTES, 0, 2, 0, NO_FREE_LIST, pages, transaction)
    head = PAGE_HEADER.pack(number, META, 0, 0)
    return (head + meta + _U64.pack(_fnv1a(meta))).ljust(PAGE_BYTES, b"\0")


def _pages(size_bytes: int) -> int:
    """Pages for elements of this size in one page with its overflow."""
    return -(-(ELEMENT_BYTES + size_bytes) // PAGE_BYTES)


def _leaf(
    number: int, pages: int, keys: Sequence[bytes], values: Sequence[bytes], flags: int = 0
) -> bytes:
    # A large store has millions of items, so functions in C do the work for each item. A loop takes
    # six times as long.
    count = len(keys)
    key_sizes, value_sizes = list(map(len, keys)), list(map(len, values))
    begins = accumulate(map(add, key_sizes, value_sizes), initial=ELEMENT_BYTES * count)
    fields = [flags] * (4 * count)
    fields[1::4] = map(sub, begins, range(0, ELEMENT_BYTES * count, ELEMENT_BYTES))
    fields[2::4], fields[3::4] = key_sizes, value_sizes
    parts = [b""] * (2 + 2 * count)
    parts[0] = PAGE_HEADER.pack(number, LEAF, count, pages - 1)
    parts[1] = struct.pack(f"<{4 * count}I", *fields)
    parts[2::2], parts[3::2] = keys, values
    content = b"".join(parts)
    assert len(content) <= pages * PAGE_BYTES
    return content.ljust(pages * PAGE_BYTES, b"\0")


def _branch(number: int, pages: int, children: list[tuple[bytes, int]]) -> bytes:
    parts = [PAGE_HEADER.pack(number, BRANCH, len(children), pages - 1)]
    offset = ELEMENT_BYTES * len(children)
    for key, page in children:
        parts.append(BRANCH_ELEMENT.pack(offset, len(key), page))
        offset += len(key) - ELEMENT_BYTES
    parts += (key for key, _ in children)
    content = b"".join(parts)
    assert len(content) <= pages * PAGE_BYTES
    return content.ljust(pages * PAGE_BYTES, b"\0")


class _Tree:
    """The pages of one bucket."""

    def __init__(self, bucket: Bucket, begin: int) -> None:
        """Lay out the bucket from page `begin` on."""
        self.bucket = bucket
        self._begin = begin
        size = bucket.most_bytes + bucket.most_items * ELEMENT_BYTES
        if size < LEAF_BYTES:
            self.root = begin
            self.pages = _pages(size)
            return
        # All leaves but the last have at least LEAF_BYTES, so there are at most this many.
        leaves = size // LEAF_BYTES + 1
        # Each is rounded up to pages, after its header.
        pages = size // PAGE_BYTES + leaves + leaves // 255 + 2
        branch_pages = _pages(MAX_CHILDREN * (ELEMENT_BYTES + bucket.most_key_bytes))
        level = leaves
        while level > MAX_CHILDREN:
            level = -(-level // MAX_CHILDREN)
            pages += level * branch_pages
        self.root = begin + pages
        self.pages = pages + branch_pages

    def content(self) -> Iterator[bytes]:
        """All pages, in order."""
        end = self._begin + self.pages
        if self.root == self._begin:
            keys: list[bytes] = []
            values: list[bytes] = []
            for some_keys, some_values in self.bucket.items:
                keys += some_keys
                values += some_values
                yield b""
            yield _leaf(self.root, self.pages, keys, values)
            return
        at = self._begin
        children: list[tuple[bytes, int]] = []
        for keys, values, size in self._leaves():
            yield b""
            if keys:
                pages = _pages(size)
                yield _leaf(at, pages, keys, values)
                children.append((keys[0], at))
                at += pages
        while len(children) > MAX_CHILDREN:
            above = []
            for begin in range(0, len(children), MAX_CHILDREN):
                part = children[begin : begin + MAX_CHILDREN]
                pages = _pages(sum(len(key) + ELEMENT_BYTES for key, _ in part))
                yield _branch(at, pages, part)
                above.append((part[0][0], at))
                at += pages
            children = above
        assert at <= self.root, "a bucket is larger than its bounds"
        while at < self.root:
            pages = min(self.root - at, EMPTY_PAGES)
            yield bytes(pages * PAGE_BYTES)
            at += pages
        if children:
            yield _branch(self.root, end - self.root, children)
        else:
            yield _leaf(self.root, end - self.root, [], [])

    def _leaves(self) -> Iterator[tuple[list[bytes], list[bytes], int]]:
        """The keys and values of each leaf, and the bytes that they take with their elements. No
        keys: a pause."""
        keys: list[bytes] = []
        values: list[bytes] = []
        size = 0
        for some_keys, some_values in self.bucket.items:
            keys += some_keys
            values += some_values
            size += sum(map(len, some_keys)) + sum(map(len, some_values))
            size += ELEMENT_BYTES * len(some_keys)
            if size >= LEAF_BYTES:
                yield keys, values, size
                keys, values, size = [], [], 0
            else:
                yield [], [], 0
        if keys:
            yield keys, values, size


# Reading.


class BoltError(Exception):
    """The file cannot be read; the text says at which page and why."""


MAX_DEPTH = 40
"""Branch pages above a leaf."""

MAX_KEY_BYTES = 32 << 10
"""The limit of bbolt."""

MAX_VALUE_BYTES = 256 << 20
"""A larger value is refused: etcd writes none."""

_SMALL_PAGE_BYTES = 1 << 20
"""Pages up to this size are read as a whole, larger ones element by element."""

Item = tuple[bytes, bytes]

Place = tuple[int, bytes]
"""Of a bucket: its root page, and the page itself if that is 0."""


class _Element(NamedTuple):
    key: bytes
    value: bytes
    page: int
    """The page that it is in, 0 if that is inline."""
    flags: int
    below: int
    """Of a branch element: the page that it leads to. Of a leaf element: 0."""


class Reader:
    """A database of bbolt. It trusts nothing: each page that is read is checked, and no page may be
    part of the database twice, so reading ends.

    Memory: a bit per page, a page per level, and one item."""

    def __init__(self, file: Any, size_bytes: int) -> None:
        """`file`, with `seek` and `read`, holds the database in its first `size_bytes`. Raises
        BoltError, OSError."""
        self._file = file
        self._size_bytes = size_bytes
        self.page_bytes, self._root, self.pages = self._meta()
        self._seen = bytearray()

    def _meta(self) -> tuple[int, int, int]:
        """Page size, root page and number of pages, from the valid meta page that counts."""
        found: dict[int, tuple[int, int, int]] = {}
        why = "it is not a database of bbolt"
        for page_bytes in (PAGE_BYTES, *(1 << n for n in range(9, 17))):
            for number in (0, 1):
                data = self._read(number * page_bytes, ELEMENT_BYTES + _META.size + _U64.size)
                if len(data) < ELEMENT_BYTES + _META.size + _U64.size:
                    continue
                meta = data[ELEMENT_BYTES : ELEMENT_BYTES + _META.size]
                magic, version, size, _, root, _, _, pages, transaction = _META.unpack(meta)
                if magic != MAGIC:
                    continue
                if _U64.unpack(data[-_U64.size :])[0] != _fnv1a(meta):
                    why = "its meta pages do not match their checksums"
                elif version != VERSION:
                    why = f"its format is version {version} of bbolt's, not {VERSION}"
                elif number == 0 or size == page_bytes:
                    if size not in (1 << n for n in range(9, 17)):
                        why = f"its pages have {size} bytes"
                    else:
                        found[transaction] = size, root, pages
            if found:
                break
        if not found:
            raise BoltError(why)
        size, root, pages = found[max(found)]
        if not 2 <= root < pages or pages * size > self._size_bytes:
            raise BoltError(
                f"it has {self._size_bytes} bytes, but should have {pages} pages of {size} bytes: "
                "it was cut"
            )
        return size, root, pages

    def _read(self, offset: int, size_bytes: int) -> bytes:
        self._file.seek(offset)
        data: bytes = self._file.read(min(size_bytes, max(0, self._size_bytes - offset)))
        return data

    def buckets(self) -> dict[bytes, Place]:
        """The place of each bucket, for `items`, by name. Begins a new reading: of each bucket, and
        of each page, once. Raises BoltError, OSError."""
        self._seen = bytearray(self.pages // 8 + 1)
        found: dict[bytes, Place] = {}
        for element in self._elements(self._root, b""):
            value = element.value
            if element.flags != IS_BUCKET or len(value) < BUCKET_VALUE.size:
                raise BoltError(f"page {element.page}: an element of the root is not a bucket")
            root, _ = BUCKET_VALUE.unpack_from(value)
            found[element.key] = root, value[BUCKET_VALUE.size :]
        return found

    def items(self, place: Place) -> Iterator[Item]:
        """Keys and values of a bucket, in order. Raises BoltError, OSError."""
        for element in self._elements(*place):
            if element.flags:
                raise BoltError(f"page {element.page}: there is a bucket within a bucket")
            yield element.key, element.value

    def _elements(self, root: int, inline: bytes) -> Iterator[_Element]:
        """The leaf elements below a page, or of an inline one, in order."""
        last: bytes | None = None
        """The last key that was read, on any page."""
        lowest = b""
        """The key that the branch gives for this page."""
        stack = [self._page(root, inline)]
        while stack:
            element = next(stack[-1], None)
            if element is None:
                stack.pop()
                continue
            key = element.key
            if key < lowest or (last is not None and key <= last):
                raise BoltError(f"page {element.page}: its keys are not in order")
            if element.below:
                if len(stack) == MAX_DEPTH:
                    raise BoltError(f"page {element.page}: the tree is too deep")
                lowest = key
                stack.append(self._page(element.below, b""))
            else:
                last = key
                yield element

    def _page(self, number: int, inline: bytes) -> Iterator[_Element]:
        """The elements of a page, or of an inline one (number 0)."""
        if number:
            base, size = number * self.page_bytes, self.page_bytes
            head = self._read(base, ELEMENT_BYTES) if 2 <= number < self.pages else b""
            if not head:
                raise BoltError(f"page {number} is referred to, but there is no such page")
        else:
            base, size, head = 0, len(inline), inline[:ELEMENT_BYTES]
        if len(head) < ELEMENT_BYTES:
            raise BoltError(f"page {number} ends inside its header")
        stored, kind, count, overflow = PAGE_HEADER.unpack(head)
        if stored != number or kind not in (BRANCH, LEAF) or (inline and kind == BRANCH):
            raise BoltError(f"page {number} is no page of a bucket: number {stored}, type {kind}")
        if number:
            self._take(number, overflow)
            size *= 1 + overflow
        table_end = ELEMENT_BYTES * (1 + count)
        if table_end > size or (kind == BRANCH and not count):
            raise BoltError(f"page {number} cannot have {count} elements")
        if not number:
            content = inline
        else:
            content = self._read(base, size if size <= _SMALL_PAGE_BYTES else table_end)
        end = table_end
        for at in range(ELEMENT_BYTES, table_end, ELEMENT_BYTES):
            flags = below = 0
            if kind == LEAF:
                flags, offset, key_size, value_size = LEAF_ELEMENT.unpack_from(content, at)
            else:
                offset, key_size, below = BRANCH_ELEMENT.unpack_from(content, at)
                value_size = 0
            begin = at + offset
            # Bbolt writes them one behind the other. What overlaps could make a small file endless.
            if begin < end or key_size > MAX_KEY_BYTES or value_size > MAX_VALUE_BYTES:
                raise BoltError(f"page {number}: element {at // ELEMENT_BYTES - 1} is damaged")
            middle, end = begin + key_size, begin + key_size + value_size
            if end > size or (kind == BRANCH and not below) or flags not in (0, IS_BUCKET):
                raise BoltError(f"page {number}: element {at // ELEMENT_BYTES - 1} is damaged")
            if end <= len(content):
                key, value = content[begin:middle], content[middle:end]
            else:
                data = self._read(base + begin, end - begin)
                key, value = data[:key_size], data[key_size:]
            yield _Element(key, value, number, flags, below)

    def _take(self, number: int, overflow: int) -> None:
        """Mark a page and its overflow as read. Raises BoltError if they were read before."""
        if number + overflow >= self.pages:
            raise BoltError(f"page {number} reaches past the end of the file")
        seen = self._seen
        for page in range(number, number + overflow + 1):
            if seen[page >> 3] & 1 << (page & 7):
                raise BoltError(f"page {page} is part of the database twice")
            seen[page >> 3] |= 1 << (page & 7)
