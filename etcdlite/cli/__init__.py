"""The parts of etcdlite-ctl; `ctl.py` is the table of its commands."""
