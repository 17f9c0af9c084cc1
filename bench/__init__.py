"""Programs that measure etcdlite beside etcd. `make bench` runs them all; start at `run.py`."""
