"""Clients of a member that log in, and a member with users."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol

from etcdlite import frames, methods, proto
from etcdlite.errors import EtcdError
from etcdlite.member import Member
from etcdlite.passwords import Cost
from etcdlite.request import Waiter
from etcdlite.wire import api
from etcdlite.wire.calls import Calls
from etcdlite.wire.streams import CALLS

CHEAP = Cost(8 << 10, 1)
"""Of tests: a hash takes 0.1 ms."""


class Housed(Protocol):
    """A member, and what drives it; a `LoneMember`, for example."""

    @property
    def member(self) -> Member: ...

    def settle(self) -> None:
        """Turn until every request is answered."""


class User:
    """One client of a member, in process: its session, and the owner of its calls."""

    protocol = "native"
    is_member = False
    is_blocked = False
    certificate_user = ""
    outbox = SimpleNamespace(is_queued=True)

    def __init__(self, house: Housed, token: str = "") -> None:
        self.house = house
        self.current_token = token
        self.answers: dict[int, Any] = {}
        """By request id: the response, or the text of the error."""
        self.messages: dict[int, list[Any]] = {}
        self.calls = Calls(house.member, self)
        self._next_id = 1

    # The session.

    def token(self, request_id: int) -> str:
        return self.current_token

    def logged_in(self, token: str) -> None:
        self.current_token = token

    def awaits(self, request_id: int) -> bool:
        return request_id not in self.answers

    def reply(self, request_id: int, method: int, body: bytes) -> None:
        self.answers[request_id] = methods.METHODS[method].response.decode(body)

    def fail(self, request_id: int, method: int, failure: EtcdError) -> None:
        self.calls.close(request_id)
        self.answers[request_id] = failure.text.removeprefix("etcdserver: ")

    def send_message(self, request_id: int, method: int, body: bytes) -> None:
        self.messages[request_id].append(methods.METHODS[method].response.decode(body))

    def end_call(self, request_id: int, method: int) -> None:
        self.calls.close(request_id)

    def is_stalled(self, request_id: int) -> bool:
        return False

    def resume(self, request_id: int) -> None:
        self.calls.resume(request_id)

    # The client.

    def send(self, name: str, /, **fields: Any) -> int:
        """Hand a request in; its id."""
        request_id, self._next_id = self._next_id, self._next_id + 1
        method = methods.METHOD_BY_NAME[name]
        request = method.request(**fields)
        body = request.encode()
        try:
            if method.number in CALLS:
                self.messages[request_id] = []
                self.calls.open(request_id, method.number, CALLS[method.number])
                self.calls.message(request_id, body)
                while self.calls.have_more:  # A lock's call begins only now.
                    self.calls.produce()
            else:
                frame = frames.frame(request_id, method.number, 0, body)
                handle, decode = api.HANDLERS[method.number]
                handle(
                    self.house.member, Waiter(self, request_id, method.number, decode(body)), frame
                )
        except EtcdError as failure:
            self.fail(request_id, method.number, failure)
        return request_id

    def ask(self, name: str, /, **fields: Any) -> Any:
        """The response, or the text of the error; of a call, all messages so far or the error."""
        request_id = self.send(name, **fields)
        self.house.settle()
        while self.calls.have_more:
            self.calls.produce()
        if request_id in self.messages:
            return self.answers.get(request_id, self.messages[request_id])
        return self.answers[request_id]

    def log_in(self, name: str, password: str = "") -> User:
        answer = self.ask("Auth.Authenticate", name=name, password=password or name)
        assert not isinstance(answer, str), answer
        return self


def add_users(house: Housed) -> None:
    """root, and `ann` who may read and write [a, c) and read k; each password is the name. Then
    enable auth."""
    nobody = User(house)
    permission = proto.Permission(permType=proto.Permission.READWRITE, key=b"a", range_end=b"c")
    one_key = proto.Permission(key=b"k")
    for name, fields in (
        ("UserAdd", {"name": "root", "password": "root"}),
        ("UserGrantRole", {"user": "root", "role": "root"}),
        ("UserAdd", {"name": "ann", "password": "ann"}),
        ("RoleAdd", {"name": "r"}),
        ("RoleGrantPermission", {"name": "r", "perm": permission}),
        ("RoleGrantPermission", {"name": "r", "perm": one_key}),
        ("UserGrantRole", {"user": "ann", "role": "r"}),
        ("AuthEnable", {}),
    ):
        answer = nobody.ask(f"Auth.{name}", **fields)
        assert not isinstance(answer, str), (name, answer)
