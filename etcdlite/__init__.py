"""etcdlite: an etcd v3 compatible key-value store for small clusters, in pure Python."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m etcdlite...`: this is the first module of the program.
    import etcdlite.interrupts  # noqa: F401

__version__ = "0.2.0"

ETCD_API_VERSION = "3.6.0"
"""The etcd version whose v3 API is served; clients gate features on it."""
