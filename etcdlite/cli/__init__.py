"""The parts of etcdlite-ctl; `table.py` has its commands."""
