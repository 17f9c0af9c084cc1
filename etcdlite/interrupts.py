"""Importing this module makes SIGINT end the process at once, without a traceback.

Python raises KeyboardInterrupt instead, and prints a traceback if that happens while a program is
still being imported. So the programs import this module before all others. `_signal` is built in;
`signal` would first import other modules. A SIGINT that the parent process ignores stays ignored.

While Python itself starts, the installed commands block SIGINT (`packaging/launcher/etcdlite`). It
is unblocked here, and one that came in between ends the process now. `python -m` has no such
protection: a SIGINT in its first milliseconds prints a traceback.
"""

import _signal  # type: ignore[import-not-found]

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
_signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGINT,))
