"""The Python client: `Client` for threads, `AsyncClient` for asyncio.

docs/python-client.md is the guide. The parts, lowest first: `errors`; `connection`, the protocol
without input and output; `link`, a connection in use; `operations`, requests and results;
`recipes`, the keys of locks and elections; `calls` and `scripts`, everything that takes waiting, as
generators; `blocking` and `aio`, the shells that wait, in threads and in asyncio.

A name is imported when it is first used, so that a program pays for what it uses: the blocking
client does not load asyncio. `__init__.pyi` shows the names to type checkers.
"""

from importlib import import_module

from etcdlite.client.errors import *  # noqa: F403

HOMES = ("errors", "operations", "blocking", "aio")
"""The modules that have the names of this package."""


def __getattr__(name: str) -> object:
    modules = map(import_module, (f"{__name__}.{home}" for home in HOMES))
    if name == "__all__":
        return [exported for module in modules for exported in vars(module)["__all__"]]
    # The other names in lower case are modules: they must not load asyncio on the way.
    if name[0].isupper() or name == "prefix_end":
        for module in modules:
            if name in vars(module)["__all__"]:
                value = globals()[name] = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
