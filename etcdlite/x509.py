"""The few fields of X.509 certificates and revocation lists (RFC 5280) that are needed beside what
`ssl` does: names, times and serial numbers. It verifies nothing.

The encoding is DER (X.690): each value is a tag byte, a length, and the content. The length is one
byte below 0x80, or 0x80 plus the number of bytes of a big-endian length. Input is hostile: every
length is checked, nothing recurses, and all that does not fit raises ValueError.
"""

from __future__ import annotations

import binascii
import calendar
import ipaddress
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

MAX_PEM_BYTES = 1 << 20
"""A larger file of certificates or keys is not read."""

MAX_BLOCKS = 1000
"""A PEM file may have this many blocks: more than any list of CAs."""

_SEQUENCE, _INTEGER, _OID = 0x30, 0x02, 0x06
_UTC_TIME, _GENERAL_TIME = 0x17, 0x18
_CONTEXT_0, _CONTEXT_3 = 0xA0, 0xA3
_DNS_NAME, _IP_ADDRESS = 0x82, 0x87
_COMMON_NAME = b"\x55\x04\x03"
_SUBJECT_ALT_NAME = b"\x55\x1d\x11"
_EXTENDED_KEY_USAGE = b"\x55\x1d\x25"
_ANY_USAGE = b"\x55\x1d\x25\x00"
_SERVER_AUTH = b"\x2b\x06\x01\x05\x05\x07\x03\x01"
_CHARSETS = {0x0C: "utf-8", 0x13: "ascii", 0x16: "ascii", 0x14: "latin-1", 0x1E: "utf-16-be"}
_TIME_FORMATS = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERAL_TIME: "%Y%m%d%H%M%SZ"}

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----\s*(.*?)-----END \1-----", re.DOTALL)


class Certificate(NamedTuple):
    serial: int
    not_before: float
    """Unix time in seconds, as `not_after`."""
    not_after: float
    common_name: str
    """Of the subject: the last one, as in Go; empty if there is none."""
    dns_names: tuple[str, ...]
    addresses: tuple[str, ...]
    """IP addresses in their usual form."""
    is_for_servers: bool
    """Its extended key usage allows serverAuth, or it has none."""

    def names(self, host: str) -> bool:
        """Whether `host`, a name or an IP address, is one of its alternative names. A * stands for
        the first label (RFC 6125 6.4.3). The common name does not count, as in Go."""
        with suppress(ValueError):
            return str(ipaddress.ip_address(host.strip("[]"))) in self.addresses
        wanted = host.lower().rstrip(".").split(".")
        names = (name.lower().rstrip(".").split(".") for name in self.dns_names)
        return any(name[1:] == wanted[1:] and name[0] in (wanted[0], "*") for name in names)


class RevocationList(NamedTuple):
    """What one certificate revocation list says."""

    serials: frozenset[int]
    next_update: float
    """When the CA promised the next list (Unix time); 0: not said."""


def blocks(pem: bytes, kind: str) -> list[bytes]:
    """The DER of each PEM block of this kind, such as CERTIFICATE. Raises ValueError."""
    found = []
    for number, match in enumerate(_BLOCK.finditer(pem)):
        if number >= MAX_BLOCKS:
            raise ValueError(f"it has more than {MAX_BLOCKS} blocks")
        if match[1].decode() == kind:
            try:
                found.append(binascii.a2b_base64(match[2]))
            except binascii.Error as failure:
                raise ValueError(f"a block {kind} is not base64 ({failure})") from failure
    return found


def kinds(pem: bytes) -> list[str]:
    """The kinds of the PEM blocks, such as CERTIFICATE and EC PRIVATE KEY, in order."""
    return [match[1].decode() for match in _BLOCK.finditer(pem)]


def _fields(der: bytes, version_tag: int) -> list[tuple[int, bytes]]:
    """The fields of what is signed, without the version, which is optional; none if it is not a
    sequence."""
    (_, whole), *_ = _values(der)
    (tag, body), *_ = _values(whole)
    fields = list(_values(body)) if tag == _SEQUENCE else []
    return fields[1:] if fields and fields[0][0] == version_tag else fields


def parse_certificate(der: bytes) -> Certificate:
    """Raises ValueError."""
    fields = _fields(der, _CONTEXT_0)
    if len(fields) < 6 or fields[0][0] != _INTEGER:
        raise ValueError("it is not a certificate")
    not_before, not_after = (_time(*value) for value in list(_values(fields[3][1]))[:2])
    extensions = next((body for tag, body in fields[6:] if tag == _CONTEXT_3), b"")
    names = _extension(extensions, _SUBJECT_ALT_NAME)
    usages = [usage for _, usage in _extension(extensions, _EXTENDED_KEY_USAGE)]
    return Certificate(
        int.from_bytes(fields[0][1], "big", signed=True),
        not_before,
        not_after,
        _common_name(fields[4][1]),
        tuple(body.decode("ascii", "replace") for tag, body in names if tag == _DNS_NAME),
        tuple(
            str(ipaddress.ip_address(body))
            for tag, body in names
            if tag == _IP_ADDRESS and len(body) in (4, 16)
        ),
        not usages or _SERVER_AUTH in usages or _ANY_USAGE in usages,
    )


def certificates(pem: bytes) -> list[Certificate]:
    """The certificates in the content of a PEM file. Raises ValueError."""
    return [parse_certificate(der) for der in blocks(pem, "CERTIFICATE")]


def ends_s(path: str) -> float | None:
    """When the first certificate of a file ends (Unix time); None if that cannot be read."""
    try:
        with open(path, "rb") as file:
            return certificates(file.read(MAX_PEM_BYTES))[0].not_after
    except (OSError, ValueError, IndexError):
        return None


def parse_revocation_list(der: bytes) -> RevocationList:
    """Raises ValueError."""
    fields = _fields(der, _INTEGER)
    if len(fields) < 3 or fields[2][0] not in _TIME_FORMATS:
        raise ValueError("it is not a revocation list")
    next_update, revoked = 0.0, b""
    for tag, body in fields[3:]:
        if tag in _TIME_FORMATS:
            next_update = _time(tag, body)
        elif tag == _SEQUENCE:
            revoked = body
    serials = set()
    for _, entry in _values(revoked):
        tag, serial = next(_values(entry), (0, b""))
        if tag != _INTEGER:
            raise ValueError("an entry has no serial number")
        serials.add(int.from_bytes(serial, "big", signed=True))
    return RevocationList(frozenset(serials), next_update)


def _values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (tag, content) of each value in `data`."""
    at, size = 0, len(data)
    while at < size:
        if at + 2 > size:
            raise ValueError("it is cut off")
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            if not 0 < count <= 4 or at + count > size:
                raise ValueError("a length is not valid")
            length = int.from_bytes(data[at : at + count], "big")
            at += count
        if at + length > size:
            raise ValueError("it is cut off")
        yield tag, data[at : at + length]
        at += length


def _time(tag: int, content: bytes) -> float:
    try:
        return float(calendar.timegm(time.strptime(content.decode("ascii"), _TIME_FORMATS[tag])))
    except (KeyError, ValueError, UnicodeDecodeError, OverflowError) as failure:
        raise ValueError("a time is not valid") from failure


def _common_name(name: bytes) -> str:
    """Of a Name: a sequence of sets of (object identifier, string)."""
    found = ""
    for _, attributes in _values(name):
        for _, attribute in _values(attributes):
            parts = list(_values(attribute))
            if len(parts) == 2 and parts[0] == (_OID, _COMMON_NAME):
                tag, content = parts[1]
                found = content.decode(_CHARSETS.get(tag, "latin-1"), "replace")
    return found


def _extension(extensions: bytes, kind: bytes) -> list[tuple[int, bytes]]:
    """The (tag, content) of each item in the extension of this kind, which is a sequence."""
    for _, sequence in _values(extensions):
        for _, extension in _values(sequence):
            parts = list(_values(extension))
            if len(parts) >= 2 and parts[0] == (_OID, kind):
                (_, items), *_ = _values(parts[-1][1])
                return list(_values(items))
    return []
