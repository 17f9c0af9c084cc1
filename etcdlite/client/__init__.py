"""The Python client: `Client` for threads, `AsyncClient` for asyncio. docs/python-client.md is the
guide; `blocking.py` names the parts."""

from etcdlite.client.blocking import *  # noqa: F403
from etcdlite.client.blocking import __all__ as __all__
from etcdlite.client.errors import *  # noqa: F403
