"""The whole cluster in one process, from one seed. See `world.py`."""
