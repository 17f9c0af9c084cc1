"""A client of the JSON gateway, which etcdlite and etcd have in common."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any


class Refused(Exception):
    """The server answered with an error; the text is its message."""


class Gateway:
    """Calls to one server, by path below /v3/; fields of type bytes are given as bytes."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: "host:port"."""
        self.endpoint = endpoint
        self.token = ""
        """Sent with every request, if it is set."""

    def call(self, path: str, **fields: Any) -> dict[str, Any]:
        """The answer to one request. Raises Refused."""
        body = json.dumps(fields, default=lambda data: base64.b64encode(data).decode()).encode()
        headers = {"Authorization": self.token} if self.token else {}
        request = urllib.request.Request(f"http://{self.endpoint}/v3/{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as failure:
            raise Refused(json.load(failure)["message"]) from None
        answer.pop("header", None)
        return answer  # type: ignore[no-any-return]

    def revision(self) -> int:
        request = urllib.request.Request(f"http://{self.endpoint}/v3/kv/range", b'{"key":"AA=="}')
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(json.load(response)["header"]["revision"])

    def state(self, revision: int = 0) -> dict[str, Any]:
        """All keys as of a revision, in the order of the keys."""
        return self.call("kv/range", key=b"\0", range_end=b"\0", revision=revision)

    def history(self, since: int) -> list[dict[str, Any]]:
        """All keys as of each revision from `since` on."""
        return [self.state(revision) for revision in range(since, self.revision() + 1)]

    def leases(self) -> dict[str, Any]:
        """By id: the granted time and the keys."""
        found = {}
        for lease in self.call("lease/leases").get("leases", []):
            told = self.call("lease/timetolive", ID=lease["ID"], keys=True)
            found[lease["ID"]] = told["grantedTTL"], sorted(told.get("keys", []))
        return found
