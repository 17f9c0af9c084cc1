"""The cluster version: which formats the members may write. See `versions.py`.

It is replicated: a bucket of the store has it, and the version to go down to while a downgrade is
enabled. So snapshots, backups and checkpoints carry it, and all members have the same one at the
same index. A store without it is of the oldest version. A new cluster begins with the newest.

With the version goes the number of the founding: members with different ones are of two clusters
with the same peer URLs and token (`rollback.py`). A `ClusterVersion` in the log sets all. It says
what it replaces, and has no effect if something else is there by then. The leader proposes it
(`version_keeper.py`).
"""

from __future__ import annotations

from etcdlite import log, proto
from etcdlite.errors import error
from etcdlite.mvcc import Store
from etcdlite.storage import layout
from etcdlite.versions import Version, parse


class ClusterVersion:
    """The cluster version as applied."""

    def __init__(self, store: Store) -> None:
        self.restore(store)

    def restore(self, store: Store) -> None:
        """Take the version of a store."""
        self._store = store
        self.version = layout.cluster_version(store.buckets)
        stored = store.buckets.get(layout.CLUSTER, {}).get(layout.CLUSTER_VERSION, b"")
        self.founding = founding_in(stored.decode())
        self.target = layout.downgrade_target(store.buckets)
        """`target`: the version to go down to; None if no downgrade is enabled."""

    def allows(self, feature: Version) -> bool:
        """Whether a feature of `versions` may be written now."""
        return feature <= self.allowed

    @property
    def allowed(self) -> Version:
        """The newest version whose formats may be written."""
        return self.version if self.target is None else min(self.version, self.target)

    def change(
        self, version: Version, target: Version | None, founding: int = 0
    ) -> proto.ClusterVersion:
        """The request that replaces what is there now. A founding that has a number keeps it."""
        number = self.founding or founding
        return proto.ClusterVersion(
            version=f"{version}.{number}" if number else str(version),
            target=_text(target),
            old_version=str(self.version),
            old_target=_text(self.target),
        )

    def has_target_of(self, change: proto.ClusterVersion) -> bool:
        """The target is the one that `change` sets."""
        return change.target == _text(self.target)

    def may_apply(self, change: proto.ClusterVersion) -> bool:
        """The versions are those that `change` replaces."""
        return (change.old_version, change.old_target) == (str(self.version), _text(self.target))

    def apply(self, request: proto.ClusterVersion) -> None:
        """Apply a `ClusterVersion`. Raises EtcdError if the versions changed since it was made."""
        if not self.may_apply(request):
            raise error("ClusterVersionUnavailable")
        before, version = self.version, request.version
        if self.founding and not founding_in(version):
            # The request was made before the cluster had a number, which stays.
            version = f"{parse(version)}.{self.founding}"
        changes = {layout.CLUSTER_VERSION: version, layout.DOWNGRADE_TARGET: request.target}
        for key, value in changes.items():
            self._store.set_bucket(layout.CLUSTER, key, value.encode() or None)
        self.restore(self._store)
        if self.version != before:
            log.info("updated cluster version", **{"from": before.full, "to": self.version.full})
        elif self.target is not None:
            log.warn("a downgrade of the cluster is enabled", target_version=self.target.full)


def founding_in(text: str) -> int:
    """The number of a founding in place of the patch number, as in "0.2.71"; 0 if none is there."""
    number = text.partition(".")[2].partition(".")[2]
    is_one = number.isascii() and number.isdigit() and len(number) <= 20
    return int(number) if is_one and int(number) < 1 << 64 else 0


def _text(version: Version | None) -> str:
    return "" if version is None else str(version)
