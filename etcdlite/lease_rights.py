"""Who may write, or read, all keys of a lease: that is what permits a user to put with the lease,
to renew and to revoke it, or to list its keys.

A lease may have 100,000 keys, and each put with the lease would look at all of them. So the users
that are permitted are remembered, as long as they may write each further key; and of those that are
not, a key that they may not write. The verdict does not depend on what is remembered, so all
members agree.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from etcdlite.auth import Auth, Author
from etcdlite.errors import error
from etcdlite.lease import Lessor
from etcdlite.rights import Rights

KEYS_PER_STEP = 1024
"""Keys of a lease that one step checks."""

MAX_KNOWN_LEASES = 10_000
MAX_LEASE_WRITERS = 8
"""Bounds of what is remembered about leases, and of users for each."""

Attach = tuple[int, "bytes | None"]
"""A lease, and a key that will be attached to it; None if there is none."""

Check = Generator[None, None, None]


class LeaseRights:
    def __init__(self, auth: Auth, lessor: Lessor) -> None:
        self._auth = auth
        self._lessor = lessor
        self._revision = 0
        """The auth revision as of which what is remembered holds."""
        self._writers: dict[int, list[str]] = {}
        """Users without the role root that may write all keys of a lease, by lease."""
        self._large: set[int] = set()
        """Those of these leases that have more than `KEYS_PER_STEP` keys, or had."""
        self._forbidden: dict[tuple[int, str], bytes] = {}
        """A key of a lease that a user may not write, by lease and user."""
        self._attaching: Sequence[Attach] = ()
        """The leases and keys of the request that was checked last, which may be applied in part:
        some of these keys may not be attached yet."""
        self._scans: list[list[int]] = []
        """Checks of the keys of a lease that are under way: [lease], or [0] if it is outdated."""

    def write_steps(self, author: Author | None, puts: Sequence[Attach]) -> Check:
        """Raise PermissionDenied unless the author may write all keys of the leases in `puts`
        (`state.lease_puts`). In steps."""
        auth = self._auth
        if author is None or not author.is_member:
            yield from auth.learn_steps(author)
            rights = auth.rights(author)
            assert author is not None
            if self._revision != auth.revision:
                self._revision = auth.revision
                self._writers, self._large, self._forbidden = {}, set(), {}
            for lease_id in {lease_id for lease_id, _ in puts}:
                if not (rights.is_root or author.name in self._writers.get(lease_id, ())):
                    yield from self._scan(lease_id, author.name, rights)
        self._attaching = [put for put in puts if put[1] is not None] or self._attaching
        for lease_id, key in puts:
            if key is None:
                continue
            for scan in self._scans:
                if scan[0] == lease_id:
                    scan[0] = 0
            writers = self._writers.get(lease_id, [])
            for name in list(writers):
                known = auth.known_rights.get(name)
                if known is None or not known.write.holds(key):
                    writers.remove(name)

    def _scan(self, lease_id: int, name: str, rights: Rights) -> Check:
        """As `write_steps`, for one lease. Remembers the result."""
        lessor, revision = self._lessor, self._auth.revision
        witness = self._forbidden.get((lease_id, name), b"")
        if witness and lessor.key_lease.get(witness) == lease_id:
            rights.check_write(witness)
        count, scan = 0, [lease_id]
        self._scans.append(scan)
        try:
            for count, key in enumerate(lessor.attached(lease_id), 1):
                if not rights.write.holds(key):
                    if len(self._forbidden) >= MAX_KNOWN_LEASES:
                        self._forbidden.clear()
                    self._forbidden[lease_id, name] = key
                    raise error("PermissionDenied")
                if count % KEYS_PER_STEP == 0:
                    yield
        finally:
            self._scans = [other for other in self._scans if other is not scan]
        if not scan[0] or revision != self._auth.revision:
            return  # During the check of a renewal, writes go on. Its result may be outdated.
        for attaching, new_key in self._attaching:
            # A renewal may be checked while a transaction is applied in part. What it finds is
            # right now, but not when all keys are attached.
            if attaching == lease_id and new_key is not None and not rights.write.holds(new_key):
                return
        if len(self._writers) >= MAX_KNOWN_LEASES:
            # The large ones stay: with many small leases, a user must not have others checked again
            # and again.
            large = self._writers.keys() & self._large
            if len(large) >= MAX_KNOWN_LEASES // 2:
                large = set()
            self._writers = {known: self._writers[known] for known in large}
            self._large = large
        if count > KEYS_PER_STEP:
            self._large.add(lease_id)
        writers = self._writers.setdefault(lease_id, [])
        if len(writers) >= MAX_LEASE_WRITERS:
            del writers[0]
        writers.append(name)

    def read_steps(self, author: Author | None, lease_id: int | None) -> Check:
        """Raise PermissionDenied unless the author may read all keys of the lease, or of all leases
        (None). In steps."""
        if author is None or not author.is_member:
            yield from self._auth.learn_steps(author)
            rights, lessor = self._auth.rights(author), self._lessor
            if not rights.is_root:
                keys = list(lessor.key_lease) if lease_id is None else lessor.attached(lease_id)
                for count, key in enumerate(keys, 1):
                    rights.check_read(key)
                    if count % KEYS_PER_STEP == 0:
                        yield
