"""Limits: how much one step of work does, and how much of a kind there may be.

A step takes about a millisecond or two. Work that takes longer yields between its steps, so that
other work gets its turn. Tests and the simulator pass smaller limits to the constructors, so that
a small state meets every border.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """The limits of one member. A name says the unit; `max_` limits refuse, the others yield."""

    # What one step does at most, by the kind of work.

    step_bytes: int = 512 << 10
    """Bytes of records that one step reads, checks and copies. A larger record takes one step."""
    sort_step_items: int = 4096
    merge_step_items: int = 1024
    """What a sort orders, and merges."""
    join_step_pieces: int = 1024
    """Pieces that are joined to one byte string."""
    range_step_keys: int = 256
    scan_step_keys: int = 256
    count_step_keys: int = 4096
    """Keys of a range, of one at an old revision, and current keys of a count at an old one."""
    delete_step_keys: int = 256
    read_step_keys: int = 256
    """Keys that a range delete removes, and previous values that it reads."""
    compare_step_keys: int = 256
    """Keys that a compare over a range visits."""
    execute_step_ops: int = 64
    apply_step_ops: int = 32
    """Operations of a transaction, and of an entry."""
    serve_step_reads: int = 32
    """Reads of one key that are answered between two looks at the clock."""
    event_step_events: int = 256
    """Events that are read from history."""
    hash_step_versions: int = 16
    compact_step_keys: int = 32
    compact_step_versions: int = 128
    """Keys that a compaction visits, and versions that it drops."""
    clean_step_records: int = 64
    """Records of a segment that cleaning reads, and moves if they are still needed."""
    expire_step_leases: int = 500
    """Deadlines that one search for expired leases examines."""
    match_step_events: int = 1_000
    send_step_watches: int = 1_000
    move_step_watches: int = 300
    """Events that are matched with watches, watches that are sent to, and watches that are moved
    from one state to another."""

    # Storage: the index, the data file and long work on them.

    recent_bytes: int = 3 << 20
    """Memory of the records that are kept after they were written or read: one to two times this
    much."""

    flush_bytes: int = 512 << 10
    """A large change reaches the data file in parts of this size, before its mark."""

    pack_keys: int = 256
    """Keys per chunk of a checkpoint."""

    pack_bytes: int = 256 << 10
    """Bytes of keys, or of the superseded versions of one key, per chunk of a checkpoint."""

    pack_revisions: int = 2048
    """Revisions per chunk of a checkpoint."""

    kept_key_changes: int = 32_768
    """Keys created, and keys deleted, that are kept for counts as of older revisions. A count looks
    at up to twice as many of each kind, which takes 3 ms."""

    # The store and requests to it.

    event_chunk_bytes: int = 16 << 10
    """Bytes of history that one read of the disk fetches."""

    history_chunk_bytes: int = 32 << 10
    """Bytes of records that one step reads when the whole history is read."""

    hash_part_versions: int = 16
    """Versions of a key that a hash looks up at once."""

    max_answer_bytes: int = 60 << 20
    """Records in the answer to one range or transaction. A connection is closed when 64 MiB wait
    to be sent and another answer is due, so an answer leaves room for others."""

    whole_answer_bytes: int = 4 << 20
    """An answer to a range with more bytes of records than this is joined in steps. Over gRPC it is
    sent while the records are read, whatever its size, if its length follows from the index."""

    max_streamed_answers: int = 32
    """Answers to ranges that are sent as they are read. Each keeps its revision from being
    compacted. Each connection has an equal share, at least one."""

    max_slow_reads: int = 4
    """Long reads that are under way at once. Each may hold a large answer that is not finished."""

    read_trial_steps: int = 4
    """Steps that a read may take before it counts as long."""

    max_waiting_reads_per_session: int = 20_000
    """Reads in steps of one session that wait for their turn."""

    max_background_reads: int = 100
    """Hashes that wait for their turn. Each connection has an equal share, at least one."""

    max_waiting_reads: int = 100_000
    """Reads in steps of all sessions that wait for their turn."""

    entry_bytes: int = 1 << 20
    """A batch of writes is cut into entries of about this size. A larger request has its own."""

    lease_checkpoint_interval_s: float = 300.0
    """How often the leader writes down the remaining time of longer leases (as in etcd)."""

    # Maintenance.

    checkpoint_bytes_per_key: int = 64
    """A checkpoint of many keys is large: it waits for this much new data per key, so that
    checkpoints at most about double what is written."""

    clean_share: float = 0.5
    """Segments with at least this share of garbage are cleaned without a request."""

    # Watches.

    max_watches_per_stream: int = 100_000
    """Watches of one stream."""

    max_key_bytes_per_stream: int = 64 << 20
    """Keys and range ends of all watches of one stream together."""

    max_watches_per_connection: int = 100_000
    """Watches of all streams of one connection."""

    max_watches: int = 200_000
    """Watches of all streams together. A watch takes about 600 bytes besides its keys."""

    max_key_bytes: int = 128 << 20
    """Keys and range ends of the watches of all streams together."""

    max_events_at_once: int = 5_000
    """Events that are sent to synced watches at once; with more, the watches fall behind."""

    max_event_bytes_at_once: int = 8 << 20
    """Bytes of records that a change of several steps may write; with more, watches fall behind."""

    max_sends_at_once: int = 5_000
    """Synced watches that are sent an event at once; the others fall behind."""

    max_moves_at_once: int = 20_000
    """Synced watches that an event may be for; with more, all watches fall behind."""

    slice_bytes: int = 64 << 10
    """History that one slice of catching up reads."""

    kept_slices: int = 12
    """Slices of history kept for watches that need them soon, each of up to 4 * `slice_bytes`."""

    slice_matches: int = 20_000
    """Events times ranges that are matched, and kept in memory, at once while catching up."""

    near_revisions: int = 10_000
    """A watch that lacks no more than this does not wait for those that lack more."""

    response_bytes: int = 1 << 20
    """A watch response ends with the revision in which it exceeds this."""

    tick_timers: int = 1_000
    """Progress timers that one tick serves."""

    # Connections.

    high_water_bytes: int = 1 << 20
    """Above this much unsent output the server does not read from the peer; streams hold back."""

    # Snapshots.

    snapshot_chunk_bytes: int = 128 << 10
    """Bytes of a snapshot that one message carries."""

    snapshot_bytes_per_s: int = 64 << 20
    """Rate of a snapshot to another member. It leaves room on the wire for other messages, and time
    for the receiver's disk."""


DEFAULT_LIMITS = Limits()

_D = DEFAULT_LIMITS
assert _D.step_bytes <= _D.whole_answer_bytes <= _D.max_answer_bytes
assert _D.pack_bytes <= _D.step_bytes and _D.flush_bytes <= _D.step_bytes
assert _D.hash_part_versions <= _D.hash_step_versions
assert _D.event_chunk_bytes <= _D.history_chunk_bytes <= _D.slice_bytes <= _D.step_bytes
assert _D.slice_bytes <= _D.response_bytes
assert _D.response_bytes <= _D.high_water_bytes <= _D.max_answer_bytes
assert _D.match_step_events <= _D.max_events_at_once
assert _D.send_step_watches <= _D.max_sends_at_once
assert _D.max_watches_per_stream <= _D.max_watches_per_connection < _D.max_watches
assert _D.max_key_bytes_per_stream <= _D.max_key_bytes


def fitting(memory_bytes: int) -> Limits:
    """Limits for a member in which all connections together may use `memory_bytes`. A long read
    holds its answer up to three times: as records, encoded, and joined."""
    reads = memory_bytes // (3 * _D.max_answer_bytes)
    return _D._replace(max_slow_reads=max(1, min(reads, _D.max_slow_reads)))
