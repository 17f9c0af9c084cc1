"""The installed commands. They import the rest only after `interrupts`."""

import etcdlite.interrupts  # noqa: F401


def run() -> int:
    """The command that the process was started as: `etcdlite-ctl`, or else `etcdlite`.

    Returns its exit status."""
    import sys

    if sys.argv[0].rpartition("/")[2] == "etcdlite-ctl":
        from etcdlite.ctl import main
    else:
        from etcdlite.__main__ import main
    return main()
