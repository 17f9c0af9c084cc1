"""`grpc.health.v1.Health`: whether this server can serve, for load balancers and orchestrators.

    HealthCheckRequest   1 service string
    HealthCheckResponse  1 status enum: UNKNOWN=0 SERVING=1 NOT_SERVING=2 SERVICE_UNKNOWN=3

The one service is "", the server itself: it serves while it knows a leader. As the protocol has it,
Check refuses another name with NOT_FOUND, and Watch answers SERVICE_UNKNOWN.
"""

from __future__ import annotations

from etcdlite import proto
from etcdlite.errors import NOT_FOUND, EtcdError
from etcdlite.member import Member
from etcdlite.proto import DecodeError, varint
from etcdlite.wire.calls import Call, CallOwner

SERVICE = "grpc.health.v1.Health"

SERVING = 1
NOT_SERVING = 2
SERVICE_UNKNOWN = 3


def fields(body: bytes) -> list[tuple[int, bytes | int]]:
    """(number, value) of each field of a message of strings, messages and varints. Raises
    DecodeError."""
    found: list[tuple[int, bytes | int]] = []
    at = 0
    while at < len(body):
        tag, at = proto.read_varint(body, at, len(body))
        value, at = proto.read_varint(body, at, len(body))
        if tag & 7 == 0:
            found.append((tag >> 3, value))
        elif tag & 7 == 2 and value <= len(body) - at:
            found.append((tag >> 3, body[at : at + value]))
            at += value
        else:
            raise DecodeError("not a field of strings, messages or varints")
    return found


def sized(number: int, value: bytes) -> bytes:
    """A field that holds a string or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def status(member: Member, service: bytes) -> int:
    if service:
        return SERVICE_UNKNOWN
    return SERVING if member.raft.leader else NOT_SERVING


def _service(body: bytes) -> bytes:
    service = dict(fields(body)).get(1, b"")
    if not isinstance(service, bytes):
        raise DecodeError("HealthCheckRequest: service is not a string")
    return service


def _response(code: int) -> bytes:
    return b"\x08" + varint(code)


class Check(Call):
    def message(self, body: bytes) -> None:
        code = status(self.member, _service(body))
        if code == SERVICE_UNKNOWN:
            raise EtcdError(NOT_FOUND, "unknown service")
        self.send(_response(code))
        self.end()


class Watch(Call):
    """The status now, and whenever it changes."""

    ticks = True

    def __init__(self, member: Member, owner: CallOwner, request_id: int, method: int) -> None:
        super().__init__(member, owner, request_id, method)
        self._service: bytes | None = None
        self._sent = 0

    def message(self, body: bytes) -> None:
        if self._service is None:
            self._service = _service(body)
            self.tick(0.0)

    def tick(self, now: float) -> None:
        if self._service is None or self.blocked:
            return
        code = status(self.member, self._service)
        if code != self._sent:
            self._sent = code
            self.send(_response(code))
