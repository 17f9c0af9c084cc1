"""The settings of a member that are more than a limit of one part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Each is a flag of a similar name (see `etcdlite --help`); the defaults are those of tests."""

    quota_bytes: int = 2 << 30
    """Of the data; 0 for no quota."""
    segment_bytes: int = 0
    """What the next segments of log and data take of the disk at once."""
    max_request_bytes: int = 1_572_864
    max_txn_ops: int = 128
    request_timeout_s: float = 7.0
    """How long a write or a linearizable read may wait."""
    election_timeout_s: float = 1.0
    progress_interval_s: float = 600.0
    """Between two progress notifications of an idle watch."""
    warn_apply_s: float = 0.1
    warn_request_s: float = 0.3
    """What takes longer is logged."""
    checkpoint_bytes: int = 64 << 20
    """New data after which a checkpoint is written."""
    max_learners: int = 1
    strict_reconfig_check: bool = True
    cluster_token: str = ""
    force_new_cluster: bool = False
