"""The ids of this member, and the ResponseHeader, which names them in every response."""

from __future__ import annotations

from typing import Any, Protocol

from etcdlite import proto
from etcdlite.proto import MAX_VARINT_BYTES, varint


class Consensus(Protocol):
    """What a header needs of `raft.Raft`."""

    term: int


class Identity:
    """The ids of a member and of its cluster. `incarnation` is random: it distinguishes this
    process from an earlier one, and from one that runs on a copy of the data directory."""

    def __init__(
        self, cluster_id: int, member_id: int, incarnation: int, consensus: Consensus
    ) -> None:
        self.cluster_id = cluster_id
        self.member_id = member_id
        self.incarnation = incarnation
        self._consensus = consensus
        self._ids = b"\x08" + varint(cluster_id) + b"\x10" + varint(member_id) + b"\x18"
        self._term = -1
        self._prefixes: list[bytes] = []
        self._suffix = b""
        self._revision = -1
        self._header = b""

    def header(self, revision: int) -> bytes:
        """A ResponseHeader as field 1 of a response. Hot path, so the latest header is cached, and
        the bytes before the revision are cached by the length of the revision."""
        term = self._consensus.term
        if self._term != term:
            self._term = term
            self._revision = -1
            self._suffix = b"\x20" + varint(term)
            ids = self._ids
            self._prefixes = [
                b"\x0a" + varint(len(ids) + size + len(self._suffix)) + ids
                for size in range(MAX_VARINT_BYTES + 1)
            ]
        if revision != self._revision:
            encoded = varint(revision)
            self._revision = revision
            self._header = self._prefixes[len(encoded)] + encoded + self._suffix
        return self._header

    def header_content(self, revision: int) -> bytes:
        """The bytes of a ResponseHeader. Revision 0 leaves the revision out."""
        term = b"\x20" + varint(self._consensus.term)
        return self._ids + varint(revision) + term if revision else self._ids[:-1] + term

    def header_message(self) -> Any:
        """A ResponseHeader without a revision, as etcd's answers about the membership have it."""
        return proto.ResponseHeader(
            cluster_id=self.cluster_id, member_id=self.member_id, raft_term=self._consensus.term
        )
