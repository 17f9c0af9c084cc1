"""Header blocks of HTTP/2 (HPACK, RFC 7541).

`Unpacker` decodes the blocks of one connection in order. Each may change the dynamic table, and the
result says whether it did: a block that did not has the same meaning until another one does. The
static table and the Huffman code are the `hpack` library's. Its decoder is not used: this one takes
a fourth of the time, which matters for clients that send a different `grpc-timeout` with every
request, and it limits the length of numbers, which `hpack` 4.0 does not.

Blocks encoded here never change the peer's dynamic table, so equal fields have equal bytes, which
can be cached.

Invariant: after a HeaderFault other than HeadersTooLarge the dynamic table is undefined, so the
connection must be closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from hpack import HPACKError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

MAX_FIELDS = 4096
"""Fields of one block. Each takes about 0.6 us, and 32 of the bytes in `MAX_LIST_BYTES`, so twice
as many as could be accepted."""

MAX_TABLE_UPDATES = 2
"""Table size updates of one block (RFC 7541, 4.2)."""

MAX_LIST_BYTES = 65_536
"""The size of the decoded fields, counted as in the RFC (4.1)."""

MAX_INTEGER_BYTES = 5
"""The length of a number after its prefix. No acceptable number is longer."""

TABLE_BYTES = 4096
"""The size of the dynamic table: the RFC's default."""

FIELD_OVERHEAD_BYTES = 32

Field = tuple[bytes, bytes]
Headers = list[Field]

_STATIC: list[Field] = [(b"", b""), *((bytes(n), bytes(v)) for n, v in HeaderTable.STATIC_TABLE)]
_FIRST_DYNAMIC = len(_STATIC)


def list_bytes(headers: Iterable[Field]) -> int:
    """The size of decoded fields, counted as for `MAX_LIST_BYTES`."""
    return sum(len(name) + len(value) + FIELD_OVERHEAD_BYTES for name, value in headers)


class HeaderFault(ValueError):
    """The peer's fault: a block that cannot be decoded."""


class HeadersTooLarge(HeaderFault):
    """The fields exceed `MAX_LIST_BYTES`."""


class TooManyFields(HeaderFault):
    """A block has more than `MAX_FIELDS`. The table is not valid any more."""


class Unpacker:
    """Decodes the header blocks of one connection."""

    def __init__(self) -> None:
        self._table: deque[Field] = deque()
        self._table_bytes = 0
        self._max_table_bytes = TABLE_BYTES

    def unpack(self, block: bytes) -> tuple[Headers, bool]:
        """The fields of a block, and whether it changed the table. Raises HeaderFault. After
        HeadersTooLarge the table is still valid."""
        headers: Headers = []
        is_changed = False
        size = at = fields = updates = 0
        end = len(block)
        try:
            while at < end:
                byte = block[at]
                if byte & 0x80:  # Indexed field.
                    index = byte & 0x7F
                    at += 1
                    if index == 0x7F:
                        index, at = _integer(block, at, index)
                    field = self._field(index)
                elif byte & 0x60 == 0x20:  # Table size update.
                    if size:
                        raise HeaderFault("a table size update is not at the start of its block")
                    most, at = _prefixed(block, at, 0x1F)
                    if most > TABLE_BYTES:
                        raise HeaderFault("a table size update exceeds the setting")
                    self._max_table_bytes = most
                    updates += 1
                    if updates > MAX_TABLE_UPDATES:
                        raise HeaderFault("a block has more than two table size updates")
                    self._evict()
                    is_changed = True
                    continue
                else:  # Literal field; 0x40: added to the table.
                    index, at = _prefixed(block, at, 0x3F if byte & 0x40 else 0x0F)
                    if index:
                        name = self._field(index)[0]
                    else:
                        name, at = _string(block, at)
                    value, at = _string(block, at)
                    field = (name, value)
                    if byte & 0x40:
                        is_changed = True
                        self._add(field)
                fields += 1
                if fields > MAX_FIELDS:
                    raise TooManyFields(f"a header has more than {MAX_FIELDS} fields")
                headers.append(field)
                size += len(field[0]) + len(field[1]) + FIELD_OVERHEAD_BYTES
                if size > MAX_LIST_BYTES:
                    headers.clear()
        except IndexError:
            raise HeaderFault("a header block is cut off") from None
        if size > MAX_LIST_BYTES:
            raise HeadersTooLarge(f"a header has more than {MAX_LIST_BYTES} bytes")
        return headers, is_changed

    def _field(self, index: int) -> Field:
        if 0 < index < _FIRST_DYNAMIC:
            return _STATIC[index]
        if not index or index - _FIRST_DYNAMIC >= len(self._table):
            raise HeaderFault(f"there is no field {index} in the table")
        return self._table[index - _FIRST_DYNAMIC]

    def _add(self, field: Field) -> None:
        self._table.appendleft(field)
        self._table_bytes += len(field[0]) + len(field[1]) + FIELD_OVERHEAD_BYTES
        if self._table_bytes > self._max_table_bytes:
            self._evict()

    def _evict(self) -> None:
        while self._table_bytes > self._max_table_bytes:
            name, value = self._table.pop()
            self._table_bytes -= len(name) + len(value) + FIELD_OVERHEAD_BYTES


def _prefixed(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """The number at `at` with a prefix of the bits in `mask`, and the position after it."""
    value = block[at] & mask
    if value == mask:
        return _integer(block, at + 1, value)
    return value, at + 1


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """The rest of a number whose prefix is all ones (RFC 7541, 5.1)."""
    for shift in range(0, 7 * MAX_INTEGER_BYTES, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise HeaderFault("a number is too long")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    byte = block[at]
    size = byte & 0x7F
    at += 1
    if size == 0x7F:
        size, at = _integer(block, at, size)
    stop = at + size
    value = block[at:stop]
    if len(value) != size:
        raise IndexError
    if byte & 0x80:
        try:
            return bytes(decode_huffman(value)), stop
        except HPACKError as fault:
            raise HeaderFault(str(fault)) from None
    return value, stop


def pack(fields: Iterable[Field]) -> bytes:
    """Encode a block. Names must be shorter than 127 bytes."""
    return b"".join(_literal(name, value) for name, value in fields)


def _literal(name: bytes, value: bytes) -> bytes:
    """A literal field without indexing, with a new name (RFC 7541, 6.2.2)."""
    assert len(name) < 0x7F
    size = len(value)
    if size < 0x7F:
        length = bytes((size,))
    else:
        length = b"\x7f"
        size -= 0x7F
        while size > 0x7F:
            length += bytes((size & 0x7F | 0x80,))
            size >>= 7
        length += bytes((size,))
    return b"\x00" + bytes((len(name),)) + name + length + value
