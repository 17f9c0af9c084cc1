"""Files with shared secrets: read, checked, made (`etcdlite-ctl secret new`), read again on change.

A file is ASCII text of at most `MAX_FILE_BYTES`. Empty lines, and lines that begin with "#", are
skipped. Each other line is one secret:

    etcdlite-secret-1:BASE64        32 random bytes in standard base64 (RFC 4648 section 4), padded

There are 1 to `MAX_SECRETS`. The first is offered to others; all are accepted from others. So a
secret is replaced in three steps on all machines: add the new one as the last line; make it the
first; remove the old one.

Invariants: a file that other users may read is refused (`private_file.py`); no secret is shown in
an error, a log line or a `repr`. The id of a secret, which is shown, is the first 8 bytes of
HMAC-SHA-256 with the secret as its key: it leads to no secret, because there are 2**256.
"""

from __future__ import annotations

import hmac
import os

from etcdlite import log, private_file
from etcdlite.private_file import SECRET_BYTES, PrivateFileError

PREFIX = "etcdlite-secret-1:"
MAX_SECRETS = 4
MAX_FILE_BYTES = 4096

CHECK_INTERVAL_S = 1.0
"""How often the file is looked at, at most."""


class Secret:
    def __init__(self, key: bytes) -> None:
        self.key = key
        """The psk of `noise.py`: 32 bytes."""
        self.id = hmac.digest(key, b"etcdlite secret id", "sha256")[:8]

    def __repr__(self) -> str:
        return f"Secret({self.id.hex()})"


Secrets = tuple[Secret, ...]
"""At least one; the first is offered."""


def ids(secrets: Secrets) -> str:
    return ", ".join(secret.id.hex() for secret in secrets)


def read(path: str) -> Secrets:
    """The secrets in a file. Raises PrivateFileError."""
    found = private_file.read_secrets(path, PREFIX, "secret", MAX_SECRETS, MAX_FILE_BYTES)
    return tuple(map(Secret, found))


def check_apart(peer: Secrets, client: Secrets) -> None:
    """Raise PrivateFileError if a client could call itself a member."""
    if {secret.id for secret in peer} & {secret.id for secret in client}:
        raise PrivateFileError(
            "peer-secret-file and client-secret-file have a secret in common: whoever has it can "
            "be a member. Make another one for the clients with 'etcdlite-ctl secret new FILE'"
        )


def create(path: str) -> Secret:
    """Make a file with one new secret, which only its owner may read. Raises PrivateFileError if it
    cannot be made, OSError if it cannot be written."""
    secret = Secret(os.urandom(SECRET_BYTES))
    line = private_file.secret_line(PREFIX, secret.key)
    private_file.create(path, f"# id {secret.id.hex()}\n{line}")
    return secret


class SecretFile:
    """The secrets of a file that may change while the process runs."""

    def __init__(self, path: str, setting: str) -> None:
        """`setting` names the file in the log. Raises PrivateFileError."""
        self.path = path
        self.apart_from: SecretFile | None = None
        """A file with which this one must have no secret in common."""
        self._setting = setting
        self._version = private_file.stamp(path)
        try:
            self._secrets = read(path)
        except PrivateFileError as failure:
            raise PrivateFileError(f"{setting}: {failure}") from failure
        self._checked_at = 0.0

    def secrets(self, now_s: float) -> Secrets:
        """The secrets for a connection that is made now. A changed file is read again; if it cannot
        be used, that is logged, and the old secrets stay in use. `now_s` is monotonic."""
        if now_s - self._checked_at >= CHECK_INTERVAL_S:
            self._checked_at = now_s
            self.reload()
        return self._secrets

    def reload(self) -> None:
        """Look at the file now."""
        version = private_file.stamp(self.path)
        if version == self._version:
            return
        try:
            secrets = read(self.path)
            if self.apart_from is not None:
                check_apart(secrets, self.apart_from._secrets)
        except (PrivateFileError, OSError) as failure:
            what, key = f"{self._setting} cannot be read again", f"secrets {self.path}"
            log.warn(f"{what}; the old secrets stay in use", key, 0.1, why=str(failure))
            return
        self._secrets, self._version = secrets, version
        log.info(f"read {self._setting} again; it applies to new connections", ids=ids(secrets))
