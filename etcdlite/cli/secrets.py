"""`etcdlite-ctl secret`: files with shared secrets."""

from __future__ import annotations

import json
import os

from etcdlite import secret_file
from etcdlite.cli.session import Session

DEFAULT_FILE = "etcdlite.secret"


def new(session: Session) -> None:
    """Make a file with one secret and print the settings that use it, as lines of TOML."""
    name = session.optional("secret new takes the name of one file")
    path = os.path.abspath(DEFAULT_FILE if name is None else name)
    made = secret_file.create(path)
    shown = json.dumps(path, ensure_ascii=False)
    text = (
        f"# A new secret, id {made.id.hex()}. Copy the file to each machine that needs it, with "
        "mode 0600.\n"
        "# Between members, in the configuration of all of them:\n"
        f"peer-secret-file = {shown}\n"
        "# Or for clients of the native protocol (never the secret of the members):\n"
        f"# client-secret-file = {shown}\n"
    )
    session.write(text.encode("utf-8", "surrogateescape"))
