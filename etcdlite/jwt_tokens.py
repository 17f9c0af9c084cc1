"""Tokens that are JSON Web Tokens (RFC 7519), as etcd makes them with `auth-token=jwt,...`: they
have the claims `username`, `revision` and `exp`, and are signed by a key from a file.

They are for clusters whose other services check the same tokens, or that get them from elsewhere: a
member that has only the public key checks tokens and issues none. A token is refused with
AuthOldRevision: for keys, once the auth revision has changed, as in etcd; for all requests, once
its user has got another password or was made again. etcd goes on to accept it for what does not
concern keys: the users, for example.

Only the configured method of signing counts, whatever a token says: none of "none", and no public
key that is taken for a shared secret. The public key may be in a certificate, as in etcd. PyJWT
does the work, and cryptography that of its keys; both are imported only here.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import Any

from etcdlite import log
from etcdlite.auth import MAX_NAME_BYTES, Auth, Author
from etcdlite.errors import FAILED_PRECONDITION, EtcdError, error
from etcdlite.notation import parse_duration_s
from etcdlite.private_file import read_file
from etcdlite.tokens import MAX_KNOWN, SimpleTokens
from etcdlite.wall_clock import unix_s

METHODS = tuple(
    f"{kind}{bits}" for kind in ("RS", "ES", "PS", "HS") for bits in (256, 384, 512)
) + ("EdDSA",)

MAX_KEY_BYTES = 64 << 10

MAX_TOKEN_CHARS = 16 << 10


class JwtTokens:
    """See the module's docstring."""

    def __init__(self, method: str, private_key: Any, public_key: Any, ttl_s: float) -> None:
        """Keys as PyJWT prepares them; without a private key no tokens are issued."""
        self._method = method
        self._private_key = private_key
        self._public_key = public_key
        self._ttl_s = ttl_s
        self._known: dict[str, tuple[str, int, float]] = {}
        """Verified tokens, the oldest first: (user, revision, when it ends)."""

    def new_seed(self) -> bytes:
        return SimpleTokens(0).new_seed()

    def issue(self, seed: bytes, name: str, revision: int) -> str:
        import jwt

        if self._private_key is None:
            raise EtcdError(
                FAILED_PRECONDITION,
                "etcdlite: this member only checks tokens: its auth-token names no priv-key",
            )
        claims = {"username": name, "revision": revision, "exp": int(unix_s() + self._ttl_s)}
        return jwt.encode(claims, self._private_key, algorithm=self._method)

    def accepts(self, token: str) -> bool:
        """Whether it is a token, of whomever."""
        try:
            self._verify(token)
        except EtcdError:
            return False
        return True

    def author(self, auth: Auth, token: str) -> Author:
        name, revision, ends = self._known.get(token) or self._verify(token)
        if unix_s() >= ends:
            self._known.pop(token, None)
            raise error("InvalidAuthToken")
        if revision < auth.since.get(name, 0):
            raise error("AuthOldRevision")
        return Author(name, revision)

    def _verify(self, token: str) -> tuple[str, int, float]:
        import jwt

        if len(token) > MAX_TOKEN_CHARS:
            raise error("InvalidAuthToken")
        try:
            claims = jwt.decode(
                token,
                self._public_key,
                algorithms=[self._method],
                options={"require": ["username", "revision", "exp"], "verify_aud": False},
            )
            name, revision = claims["username"], claims["revision"]
            if not isinstance(name, str) or len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError
            if not isinstance(revision, int) or not 0 <= revision < 1 << 63:
                raise ValueError
            known = (name, revision, float(claims["exp"]))
        except (jwt.InvalidTokenError, ValueError, TypeError, OverflowError, RecursionError):
            # Old PyJWT: TypeError for a time that is a list, RecursionError for deeply nested JSON.
            raise error("InvalidAuthToken") from None
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[token] = known
        return known


def load(options: Mapping[str, str]) -> JwtTokens:
    """The tokens that the options of `auth-token=jwt,...` describe. Raises ValueError, which says
    what to do, if a key or a package is missing or does not fit."""
    method = options.get("sign-method", "")
    if method not in METHODS:
        raise ValueError(f"sign-method must be one of {', '.join(METHODS)}")
    try:
        import jwt

        algorithm = jwt.get_algorithm_by_name(method)
    except (ImportError, NotImplementedError):
        raise ValueError(
            "jwt needs the packages python3-jwt and python3-cryptography (or: pip install "
            "'pyjwt[crypto]')"
        ) from None
    ttl_s = parse_duration_s(options.get("ttl", "5m"))
    keys: dict[str, Any] = {}
    for name in ("priv-key", "pub-key"):
        if name in options:
            key: Any = _read(options[name], name == "priv-key" or method.startswith("HS"))
            try:
                if name == "pub-key" and b"-----BEGIN CERTIFICATE-----" in key:
                    from cryptography import x509

                    key = x509.load_pem_x509_certificate(key).public_key()
                # Twice: PyJWT 2.6 checks the kind of a key only if it is not PEM.
                keys[name] = algorithm.prepare_key(algorithm.prepare_key(key))
            except (ValueError, TypeError, jwt.InvalidKeyError) as failure:
                raise ValueError(
                    f"{options[name]} does not hold a key in PEM that {method} can use: {failure}"
                ) from None
    private_key, public_key = keys.get("priv-key"), keys.get("pub-key")
    if method.startswith("HS"):
        # A shared secret signs and checks; etcd takes it from either option.
        private_key = public_key = private_key or public_key
    elif private_key is not None:
        if not hasattr(private_key, "public_key"):
            raise ValueError(f"{options['priv-key']} holds a public key")
        public_key = public_key or private_key.public_key()
    if public_key is None:
        raise ValueError("jwt needs priv-key=FILE, or pub-key=FILE to check tokens only")
    tokens = JwtTokens(method, private_key, public_key, ttl_s)
    if private_key is not None and not tokens.accepts(tokens.issue(b"", "test", 1)):
        raise ValueError(f"{options['pub-key']} is not the public key of {options['priv-key']}")
    return tokens


def _read(path: str, is_secret: bool) -> bytes:
    try:
        content, found = read_file(path, MAX_KEY_BYTES)
    except OSError as failure:
        raise ValueError(f"cannot read the key {path}: {failure.strerror}; correct that") from None
    if is_secret and found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warn("others may read a private key; use 'chmod o= FILE'", file=path)
    if len(content) > MAX_KEY_BYTES:
        raise ValueError(f"{path} is no key: it has more than {MAX_KEY_BYTES} bytes")
    return content
