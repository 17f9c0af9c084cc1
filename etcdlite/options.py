"""The settings of a member that several of its parts use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from etcdlite.passwords import DEFAULT_COST, Cost
from etcdlite.versions import CURRENT, Version
from etcdlite.wall_clock import unix_s


class Options(NamedTuple):
    """Each is a flag of a similar name (see `etcdlite --help`); the defaults are those of tests."""

    quota_bytes: int = 2 << 30
    """The limit of the size of the data; 0 for no quota."""
    segment_bytes: int = 0
    """Disk space that the next segments of log and data take when they are created."""
    wal_dir: str = ""
    """The directory of the log if it is not in the data directory."""
    wal_segment_bytes: int = 0
    """Disk space that the next segment of the log takes when it is created."""
    max_request_bytes: int = 1_572_864
    max_txn_ops: int = 128
    request_timeout_s: float = 7.0
    """How long a write or a linearizable read may wait."""
    election_timeout_s: float = 1.0
    progress_interval_s: float = 600.0
    """Between two progress notifications of an idle watch."""
    warn_apply_s: float = 0.1
    warn_request_s: float = 0.3
    """Applying an entry, and answering a request, is logged if it takes longer than this."""
    checkpoint_bytes: int = 64 << 20
    """New data after which a checkpoint is written."""
    max_learners: int = 1
    strict_reconfig_check: bool = True
    cluster_token: str = ""
    force_new_cluster: bool = False
    password_cost: Cost = DEFAULT_COST
    """What hashes of new passwords cost."""
    token_ttl_s: float = 300.0
    """How long a token lives after it was last used."""
    wall_clock: Callable[[], float] = unix_s
    """The Unix time in seconds. No flag: for the simulator."""
    version: Version = CURRENT
    """The version of etcdlite as which the member takes part. No flag: for the simulator."""
