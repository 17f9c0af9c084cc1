"""Tokens: what a client gets for its password, and sends with each request.

A token is signed by the key that the members share in their state (`Auth.key`), so every member
accepts it, also after a restart. It is the base64url text, without padding, of

    0   1  format version, 1
    1   8  auth revision under which it was issued, u64 big-endian
    9   8  the time at which it ends, in seconds since 1970, u64 big-endian
    17  n  name of the user, UTF-8
        64 Ed25519 signature (RFC 8032) of b"etcdlite token\\0", the cluster id (u64 big-endian) and
           everything before the signature

A token is valid if the signature is, if the user has not been deleted or got another password
since (`Auth.since`), if its auth revision is not ahead of the member's, and if it has not ended. As
with etcd's simple tokens, each use extends it: at the member that it was sent to it lives for
another `ttl_s`, even if the wall clock is changed. Only a member that does not know the token,
because it was restarted or was sent more than `MAX_KNOWN` others, uses the time in it.

A member keeps the tokens that it has verified, because verifying one takes 0.1 ms. It keeps those
that have ended, too: otherwise they would be valid again after the wall clock was set back.

With `auth-token=jwt,...`, tokens are those of RFC 7519, as etcd makes them, and never extended.
They are refused with AuthOldRevision once the auth revision has changed.
"""

from __future__ import annotations

import os
import struct
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Protocol

from etcdlite.auth import MAX_NAME_BYTES, SEED_BYTES, Auth, Author
from etcdlite.errors import ERRORS, EtcdError, error
from etcdlite.wall_clock import unix_s

DEFAULT_TTL_S = 300.0

MAX_KNOWN = 4096
"""Verified tokens that a member keeps."""

EXTEND_AFTER_S = 1.0
"""A token in use is extended once in this time."""

FORMAT_VERSION = 1
SIGNATURE_BYTES = 64
_HEAD = struct.Struct(">BQQ")
_CONTEXT = b"etcdlite token\0"

MAX_TOKEN_CHARS = (_HEAD.size + MAX_NAME_BYTES + SIGNATURE_BYTES) * 4 // 3 + 4


class TokenAhead(EtcdError):
    """InvalidAuthToken: the token is signed, but of a later auth revision than this member's. It
    may be valid once the member has applied what others have."""


_Known = tuple[int, float, Author]
"""Of a verified token: its auth revision, when it ends (monotonic seconds), and its author as of
the last use."""


class Tokens(Protocol):
    """One kind of tokens."""

    def issue(self, seed: bytes, name: str, revision: int) -> str:
        """A new token for a user. Takes milliseconds; run it in a thread."""

    def author(self, auth: Auth, token: str) -> Author:
        """Whose token it is. Raises EtcdError InvalidAuthToken, as TokenAhead if it may become
        valid."""

    def new_seed(self) -> bytes:
        """A key for the members to share."""


class SimpleTokens:
    """The tokens that need no configuration."""

    def __init__(
        self,
        cluster_id: int,
        ttl_s: float = DEFAULT_TTL_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = unix_s,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`clock` returns monotonic seconds, `wall_clock` the seconds since 1970; the wall clocks
        of the members should differ by much less than `ttl_s`. `entropy(n)` returns n secret random
        bytes."""
        self._entropy = entropy
        self._context = _CONTEXT + cluster_id.to_bytes(8, "big")
        self._clock = clock
        self._wall_clock = wall_clock
        self._ttl_s = ttl_s
        self._known: dict[str, _Known] = {}
        """Verified tokens, those used last at the end."""
        self._seed = b""
        """The key that verified them."""
        self._public_key = b""

    def new_seed(self) -> bytes:
        return self._entropy(SEED_BYTES)

    def issue(self, seed: bytes, name: str, revision: int) -> str:
        from nacl.bindings import crypto_sign, crypto_sign_seed_keypair

        ends = int(self._wall_clock() + self._ttl_s)
        content = _HEAD.pack(FORMAT_VERSION, revision, ends) + name.encode()
        _, secret_key = crypto_sign_seed_keypair(seed)
        signature = crypto_sign(self._context + content, secret_key)[:SIGNATURE_BYTES]
        return self._encode(content + signature)

    def author(self, auth: Auth, token: str) -> Author:
        now = self._clock()
        known = self._known.get(token)
        if known is None or self._seed != auth.key:
            known = self._verify(auth, token, now)
        revision, ends, author = known
        if now + self._ttl_s - EXTEND_AFTER_S < ends and author.revision == auth.revision:
            return author  # The hot path: nothing has changed since the last use, just before.
        name = author.name
        since = auth.since.get(name)
        if revision > auth.revision and now < ends:
            raise TokenAhead(*ERRORS["InvalidAuthToken"])
        if since is None or revision < since or now >= ends:
            raise error("InvalidAuthToken")
        author = Author(name, auth.revision)
        self._keep(token, (revision, now + self._ttl_s, author))
        return author

    def _verify(self, auth: Auth, token: str, now: float) -> _Known:
        from nacl.bindings import crypto_sign_open, crypto_sign_seed_keypair
        from nacl.exceptions import BadSignatureError

        if self._seed != auth.key:
            self._known.clear()
            self._seed = auth.key
            self._public_key = crypto_sign_seed_keypair(auth.key)[0] if auth.key else b""
        if len(token) > MAX_TOKEN_CHARS or not auth.key:
            raise error("InvalidAuthToken")
        try:
            signed = urlsafe_b64decode(token + "=" * (-len(token) % 4))
            content, signature = signed[:-SIGNATURE_BYTES], signed[-SIGNATURE_BYTES:]
            version, revision, ends = _HEAD.unpack_from(content)
            name = content[_HEAD.size :].decode()
            if version != FORMAT_VERSION or self._encode(signed) != token:
                raise error("InvalidAuthToken")
            crypto_sign_open(signature + self._context + content, self._public_key)
        except (ValueError, struct.error, BadSignatureError):
            raise error("InvalidAuthToken") from None
        left_s = ends - self._wall_clock()
        if left_s <= 0:
            raise error("InvalidAuthToken")  # Not kept: the wall clock may be wrong.
        # Of no auth revision yet: the rest is checked by the caller.
        known = (revision, now + min(left_s, self._ttl_s), Author(name, 0))
        self._keep(token, known)
        return known

    @staticmethod
    def _encode(signed: bytes) -> str:
        return urlsafe_b64encode(signed).rstrip(b"=").decode()

    def _keep(self, token: str, known: _Known) -> None:
        self._known.pop(token, None)
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[token] = known
