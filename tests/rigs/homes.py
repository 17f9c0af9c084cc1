"""The places of members in directories of a test."""

from __future__ import annotations

import os
from typing import Any

from etcdlite.datadir import Home
from etcdlite.storage.disk import Disk


def home(data_dir: str | os.PathLike[str], **more: Any) -> Home:
    """A member in this directory; `more` as for `Home`."""
    return Home(Disk(), os.fspath(data_dir), **more)
