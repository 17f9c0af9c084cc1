"""The Python client: `Client` for threads, `AsyncClient` for asyncio.

docs/python-client.md is the guide. The parts, lowest first: `errors`; `connection`, the protocol
without input and output; `operations`, requests and results; `recipes`, locks and elections;
`scripts`, everything a client does that takes waiting, as generators; `blocking` and `aio`, which
wait, in a thread and in asyncio.

A name is imported when it is first used, so that a program pays for what it uses: the blocking
client does not load asyncio. `__init__.pyi` shows the names to type checkers.
"""

from importlib import import_module

from etcdlite.client.errors import *  # noqa: F403
from etcdlite.client.errors import __all__ as _ERRORS

_OPERATIONS = [
    "Alarm",
    "Bytes",
    "Comparison",
    "CreateRevision",
    "Delete",
    "DeleteResult",
    "Event",
    "Get",
    "HashKV",
    "KeyValue",
    "LeaseGrant",
    "LeaseInfo",
    "LeaseOf",
    "Member",
    "ModRevision",
    "Op",
    "Put",
    "PutResult",
    "Range",
    "RangeResult",
    "Status",
    "Txn",
    "TxnResult",
    "Value",
    "Version",
    "WatchBatch",
    "prefix_end",
]
_BLOCKING = ["Client", "Stream", "Watch", "Lease", "Lock", "Election", "Leadership"]
_AIO = [f"Async{name}" for name in _BLOCKING]

HOMES = {"errors": _ERRORS, "operations": _OPERATIONS, "blocking": _BLOCKING, "aio": _AIO}
"""The names of each module."""

__all__ = [*_BLOCKING, *_AIO, *_OPERATIONS, *_ERRORS]


def __getattr__(name: str) -> object:
    for home, names in HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
