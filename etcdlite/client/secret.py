"""The shared secret of a client: the file, and the channels that it gives.

The file is read when a client is made, and again for each new connection. If it cannot be used
then, the client goes on with what it has read before. `nacl` takes time and memory to import: this
module is imported only for a client with a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from etcdlite import secret_file
from etcdlite.channel import Channel
from etcdlite.private_file import PrivateFileError
from etcdlite.secret import CLIENT, InitiatorChannel


def make_channel_for(path: str) -> Callable[[object], Callable[[], Channel]]:
    """Make a function that takes an endpoint and returns the function that makes the channel of
    each connection to it. Raises ValueError if the file cannot be used."""
    try:
        secrets = secret_file.read(path)
    except PrivateFileError as failure:
        raise ValueError(f"secret_file: {failure}") from None

    def make() -> Channel:
        nonlocal secrets
        with suppress(PrivateFileError):  # The file may be half-written.
            secrets = secret_file.read(path)
        return InitiatorChannel(secrets, CLIENT)

    return lambda endpoint: make
