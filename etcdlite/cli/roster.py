"""The members of a cluster as one look at each of them shows: its status and its metrics.

Members are asked at the same time, one thread each, so that one that does not answer delays the
look only until its timeout. Each has a connection of its own, which stays for the next look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etcdlite.cli import scrape
from etcdlite.cli.failures import BadArguments, Failure
from etcdlite.cli.session import Session, cause, dialled
from etcdlite.client import Client, EtcdliteError

MAX_MEMBERS = 32
"""More are not looked at."""


class Seen(NamedTuple):
    """A member, and what one look at it shows."""

    name: str
    """Its endpoint if the name is not known."""
    member_id: int = 0
    """0 if it is not known."""
    endpoint: str = ""
    is_learner: bool = False
    error: str = ""
    """Why it does not answer."""
    status: Any = None
    """Its StatusResponse; None if it does not answer."""
    took_s: float = 0.0
    """Time from that request to the answer."""
    series: scrape.Series | None = None
    """Its metrics."""
    series_error: str = ""
    """Why there are none."""
    certificate_ends_s: float | None = None
    """Unix time; None without TLS."""


class Roster:
    """The members that are looked at. Close it after use."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._clients: dict[tuple[str, ...], Client] = {}
        self._pool = ThreadPoolExecutor(MAX_MEMBERS)
        self._ids: dict[int, str] = {}
        """The given endpoints by the members that answered there."""
        self.error = ""
        """Why the members are not known, and only the given endpoints are looked at."""

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def look(self) -> list[Seen]:
        """All members, or the endpoints if nobody names the members. Raises Failure."""
        # Asks for a password, and reads the files of TLS, before there are threads.
        self._session.connection(self._session.endpoints)
        endpoints = self._session.endpoints[:MAX_MEMBERS]
        if not self._ids:
            at = self._each(self._see_endpoint, endpoints)
            self._ids = {seen.member_id: seen.endpoint for seen in at if seen.status}
            if not self._ids:
                return at
        try:
            members: Sequence[Any] = self._session.ask("Cluster.MemberList").members
        except EtcdliteError as error:
            self.error = f"the list of members: {cause(error)}"
            return self._each(self._see_endpoint, endpoints)
        self.error = ""
        return self._each(self._see_member, members[:MAX_MEMBERS])

    def _each(self, see: Callable[[Any], Seen], items: Iterable[Any]) -> list[Seen]:
        return list(self._pool.map(see, items))

    def _see_endpoint(self, endpoint: str) -> Seen:
        return self.see((endpoint,), endpoint)

    def _see_member(self, member: Any) -> Seen:
        known = self._ids.get(member.ID)
        urls = (known,) if known else tuple(member.clientURLs)
        name = member.name or f"{member.ID:x}"
        about = Seen(name, member.ID, urls[0] if urls else "", member.isLearner)
        if not urls:
            return about._replace(error="it was added to the cluster and has not started")
        seen = self.see(urls, name)
        if seen.status is not None and seen.member_id != member.ID:
            return about._replace(error="another member answers at its advertised URL")
        return seen._replace(name=name, member_id=member.ID, is_learner=member.isLearner)

    def see(self, urls: tuple[str, ...], name: str) -> Seen:
        """The member at these URLs."""
        try:
            client = self._client(urls)
            status, took_s = self.status(urls)
        except EtcdliteError as error:
            return Seen(name, endpoint=urls[0], error=cause(error))
        except Failure as failure:
            return Seen(name, endpoint=urls[0], error=failure.text)
        member_id = status.header.member_id if status.header is not None else 0
        seen = Seen(name, member_id, client.endpoint, status.isLearner, "", status, took_s)
        seen = seen._replace(certificate_ends_s=client.certificate_ends_s)
        try:
            return seen._replace(series=scrape.fetch(self._session, client.endpoint))
        except (OSError, ValueError, BadArguments) as error:
            return seen._replace(series_error=scrape.why(error))

    def status(self, urls: tuple[str, ...]) -> tuple[Any, float]:
        """(StatusResponse, seconds until it came) of the member at these URLs. Raises
        EtcdliteError."""
        began = time.monotonic()
        return self._session.ask("Maintenance.Status", self._client(urls)), time.monotonic() - began

    def _client(self, urls: tuple[str, ...]) -> Client:
        urls = tuple(map(dialled, urls))
        if urls not in self._clients:
            # A login needs the leader. The status of a member needs neither a leader nor rights.
            self._clients[urls] = self._session.client_for(urls, logs_in=False)
        return self._clients[urls]
