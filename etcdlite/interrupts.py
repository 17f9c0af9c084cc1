"""Importing this module makes SIGINT end the process at once, without a traceback.

Python raises KeyboardInterrupt instead, and prints a traceback if that happens while a program is
still being imported. So the programs import this module before all others. `_signal` is built in;
`signal` would first import other modules. A SIGINT that the parent process ignores stays ignored.
In the milliseconds before, in which Python itself starts, a traceback still appears.
"""

import _signal  # type: ignore[import-not-found]

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
