"""The versions of etcdlite that work together, and the features that each of them brought.

A **cluster version** is the version whose formats the members of a cluster may use. It is part of
the replicated state (`replica/cluster_version.py`). The leader raises it when all members run a
program that understands it; `downgrade enable` lowers it, so that an older program can be started.

A new kind of log entry, record of the data file or frame between members is only written when the
cluster version allows it: a line among the features below, and `cluster_version.allows(FEATURE)`
where it is written. A new method of the log has its version in `methods.py`, too. What is read
needs no such test: every program reads what earlier ones wrote.

Versions here are those of etcdlite, without the patch number, which never changes a format. They
relate to the versions of etcd that clients see only through `etcd_version`: a cluster presents the
newest API of etcd that all its members serve.

Members of two neighbouring versions work together in one cluster. A program refuses the data of a
newer cluster version, and data whose cluster version is two or more versions older than itself.
"""

from __future__ import annotations

from typing import NamedTuple

from etcdlite import __version__


class Version(NamedTuple):
    """A version of etcdlite without its patch number. Versions compare by age."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def full(self) -> str:
        """As etcd writes the version of a cluster: with a patch number of 0."""
        return f"{self}.0"


def parse(text: str) -> Version:
    """The version in a text such as "0.2" or "0.2.1" (what follows the minor number is ignored).
    Raises ValueError."""
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    for number in (major, minor):
        # int() would take signs, blanks and other scripts' digits.
        if not (number.isascii() and number.isdigit() and len(number) <= 4):
            raise ValueError(f"{text!r} is not a version such as 0.2")
    return Version(int(major), int(minor))


V0_1 = Version(0, 1)
V0_2 = Version(0, 2)

ETCD_VERSIONS = {V0_1: "3.6.0", V0_2: "3.6.0"}
"""All versions of etcdlite, the oldest first, and the etcd version whose API each serves."""

ALL = tuple(ETCD_VERSIONS)
OLDEST = ALL[0]
"""The cluster version of data that names none."""
CURRENT = parse(__version__)
"""The version of this program."""

assert ALL[-1] == CURRENT and list(ALL) == sorted(ALL)


# The features, by the first version that understands them; every later one does, too.

SETS_VERSION = V0_2
"""Log entries that say which version they need, and that set the cluster's."""

KEEPS_TIMES = V0_2
"""The times of revisions, and who made them."""

NEGATIVE_LEASES = V0_2
"""The ids of leases may be negative."""


def program_version(version: Version) -> str:
    """What a program of this version says about itself."""
    return __version__ if version == CURRENT else version.full


def etcd_version(version: Version) -> str:
    """The etcd version that a cluster of this version presents."""
    return ETCD_VERSIONS.get(version, ETCD_VERSIONS[CURRENT])


def previous(version: Version) -> Version | None:
    """The version before this one. None for the oldest, and for a version that is unknown here."""
    at = ALL.index(version) if version in ETCD_VERSIONS else 0
    return ALL[at - 1] if at else None


def incompatibility(program: Version, cluster: Version) -> str:
    """Why a program of version `program` cannot be a member of a cluster of version `cluster`, and
    what to do. Empty if it can."""
    if program < cluster:
        return (
            f"the cluster has version {cluster}, and etcdlite {program} is too old for it. Start "
            f"etcdlite {cluster} or later. To go back to etcdlite {program}, start {cluster} "
            f"again, run 'etcdlite-ctl downgrade enable {program}', and wait until 'etcdlite-ctl "
            "downgrade status' shows that storage version for this member"
        )
    if program in ETCD_VERSIONS and ALL.index(program) > _index(cluster) + 1:
        following = ALL[_index(cluster) + 1]
        return (
            f"the cluster has version {cluster}, and etcdlite {program} is too new for it. First "
            f"update all members to etcdlite {following}"
        )
    return ""


def _index(version: Version) -> int:
    return sum(known <= version for known in ALL) - 1
