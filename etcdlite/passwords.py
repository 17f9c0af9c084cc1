"""Hashes of passwords. The functions that compute take tens of milliseconds: run them in a thread.

New hashes are argon2id (RFC 9106) from libsodium, as text that names its cost:

    $argon2id$v=19$m=<KiB>,t=<passes>,p=1$<salt>$<hash>

The default cost is the least that OWASP's Password Storage Cheat Sheet recommends, because a
machine with 512 MB must afford two at a time. bcrypt hashes, which come with the users of an etcd,
are verified if the package bcrypt is installed.

A hash that is not in one of these forms, or that would take more than `MAX_MEMORY_BYTES`,
`MAX_PASSES` or `MAX_BCRYPT_COST`, is refused before it is stored and never computed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from etcdlite.errors import FAILED_PRECONDITION, EtcdError

MAX_PASSWORD_BYTES = 4096

MAX_MEMORY_BYTES = 64 << 20
MAX_PASSES = 8
MAX_BCRYPT_COST = 14
"""The costliest hashes accepted: each takes about a second on a slow machine."""

BCRYPT_BYTES = 72
"""bcrypt reads this much of a password, as etcd does."""

_ARGON2ID = re.compile(
    rb"\$argon2id\$v=19\$m=([0-9]{1,7}),t=([0-9]{1,2}),p=1\$[A-Za-z0-9+/]{11,64}\$[A-Za-z0-9+/]{22,86}"
)
_BCRYPT = re.compile(rb"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}")


class Cost(NamedTuple):
    """What computing a hash takes."""

    memory_bytes: int = 19 << 20
    """At least 8 KiB."""
    passes: int = 2


DEFAULT_COST = Cost()


def hash_password(password: str, cost: Cost = DEFAULT_COST) -> bytes:
    """A new argon2id hash with a random salt."""
    # Imported only here, because most members have no users.
    from nacl.pwhash import argon2id

    return argon2id.str(password.encode(), opslimit=cost.passes, memlimit=cost.memory_bytes)


def is_right(password: str, stored: bytes) -> bool:
    """Whether `stored` is a hash of the password. Raises EtcdError if it is a bcrypt hash, and the
    package that reads it is missing."""
    if not is_hash(stored):
        return False
    if is_bcrypt(stored):
        try:
            import bcrypt
        except ImportError:
            raise EtcdError(
                FAILED_PRECONDITION,
                "etcdlite: the password of this user came from etcd as a bcrypt hash: install "
                "python3-bcrypt on this member, or have root set the password again",
            ) from None
        try:
            return bool(bcrypt.checkpw(password.encode()[:BCRYPT_BYTES], stored))
        except ValueError:  # The salt is none; before bcrypt 4, the password has a NUL.
            return False
    from nacl.exceptions import InvalidkeyError
    from nacl.pwhash import argon2id

    try:
        return argon2id.verify(stored, password.encode())
    except (InvalidkeyError, ValueError):  # ValueError: a longer hash than libsodium makes.
        return False


def is_bcrypt(stored: bytes) -> bool:
    return stored.startswith(b"$2")


def is_hash(stored: bytes) -> bool:
    """Whether this is a hash that may be stored and computed."""
    if match := _ARGON2ID.fullmatch(stored):
        memory_bytes, passes = int(match[1]) << 10, int(match[2])
        return 8 << 10 <= memory_bytes <= MAX_MEMORY_BYTES and 1 <= passes <= MAX_PASSES
    match = _BCRYPT.fullmatch(stored)
    return match is not None and 4 <= int(match[1]) <= MAX_BCRYPT_COST
