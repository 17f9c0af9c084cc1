"""The installed commands. They import the rest only after `interrupts`."""

import etcdlite.interrupts  # noqa: F401


def server() -> int:
    """The command `etcdlite`. Returns its exit status."""
    from etcdlite.__main__ import main

    return main()


def ctl() -> int:
    """The command `etcdlite-ctl`. Returns its exit status."""
    from etcdlite.ctl import main

    return main()
