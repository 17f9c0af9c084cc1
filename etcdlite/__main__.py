"""`python -m etcdlite` starts the server, as the `etcdlite` command does."""

from __future__ import annotations

import sys

from etcdlite.server import main

if __name__ == "__main__":
    sys.exit(main())
