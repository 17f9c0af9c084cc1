"""The shared secret of a client: the file, and the channels that it gives.

The file is read when a client is made, and again for each new connection. If it cannot be used
then, the client goes on with what it has read before. `nacl` takes time and memory to import: this
module is imported only for a client with a secret.
"""

from __future__ import annotations

from collections.abc import Callable

from etcdlite import secret_file
from etcdlite.channel import Channel
from etcdlite.client.connection import Endpoint
from etcdlite.secret import CLIENT, InitiatorChannel
from etcdlite.secret_file import SecretError


class Dialer:
    """Makes the channels of one client."""

    def __init__(self, path: str) -> None:
        """Raises ValueError if the file cannot be used."""
        self._path = path
        try:
            self._secrets = secret_file.read(path)
        except SecretError as failure:
            raise ValueError(f"secret_file: {failure}") from None

    def channel_for(self, endpoint: Endpoint) -> Callable[[], Channel]:
        """The function that makes the channel of a connection."""
        return self._make

    def _make(self) -> Channel:
        try:
            self._secrets = secret_file.read(self._path)
        except SecretError:
            pass  # It may be half-written.
        return InitiatorChannel(self._secrets, CLIENT)
