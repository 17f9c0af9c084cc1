# The names of `etcdlite.client` for type checkers; `__init__.py` imports them when they are used.
# ruff: noqa: F403

from etcdlite.client.aio import *
from etcdlite.client.blocking import *
from etcdlite.client.errors import *
from etcdlite.client.operations import *
