"""The exceptions of the Python client.

All are `EtcdliteError`s with a gRPC status code and a text. There is a class for each of etcd's
errors (`errors.ERRORS`) that a program may want to catch, under etcd's name, and one for each error
that the client itself detects.
"""

from __future__ import annotations

from typing import Any

from etcdlite import errors as _etcd  # Private, so that an "import *" leaves it out.

_BY_TEXT: dict[str, type[EtcdliteError]] = {}


class EtcdliteError(Exception):
    """Any failure of a call. `code` is a gRPC status code, `text` one line for people.

    `endpoint` is the server it concerns ("127.0.0.1:2379"), or "". A subclass with the name of an
    etcd error stands for that error; an error without a class of its own is an EtcdliteError."""

    code: int = _etcd.UNKNOWN
    text: str = ""
    endpoint: str = ""

    def __init_subclass__(cls, names: tuple[str, ...] | None = None) -> None:
        if names is None:
            names = (cls.__name__,) if cls.__name__ in _etcd.ERRORS else ()
        for name in names:
            cls.code, cls.text = _etcd.ERRORS[name]
            _BY_TEXT[cls.text] = cls

    def __init__(
        self, code: int | None = None, text: str | None = None, endpoint: str = ""
    ) -> None:
        self.code = type(self).code if code is None else code
        self.text = type(self).text if text is None else text
        self.endpoint = endpoint
        # Not super(): for some subclasses that is OSError, which would take the code for an errno.
        Exception.__init__(self, self.code, self.text)

    def __str__(self) -> str:
        return self.text


# What the client itself detects.


class ConnectionFailed(EtcdliteError, ConnectionError):
    """No endpoint could be reached; or a read's connection broke again and again."""

    code = _etcd.UNAVAILABLE


class Timeout(EtcdliteError, TimeoutError, names=()):
    """No answer in time. A write may or may not have been carried out."""

    code = _etcd.DEADLINE_EXCEEDED


class UnknownOutcome(EtcdliteError):
    """The connection broke after a write was sent: it may or may not have been carried out."""

    code = _etcd.UNAVAILABLE


class ProtocolViolation(EtcdliteError):
    """The server violated the protocol."""

    code = _etcd.INTERNAL


class Closed(EtcdliteError):
    """The client, or the stream, was closed."""

    code = _etcd.CANCELED
    text = "the client is closed"


class WrongProcess(EtcdliteError):
    """The client was made before a `fork`, in the parent of this process."""

    code = _etcd.FAILED_PRECONDITION


class NotElected(EtcdliteError):
    """This candidate is not the leader, or no longer."""

    code = _etcd.CANCELED
    text = "not the leader of this election"


class LeaseLost(EtcdliteError):
    """A lease ended before its holder gave it up, and its lock or leadership with it."""

    code = _etcd.CANCELED
    text = "the lease was lost"


# What a server answers. Its text selects the class.


class Unimplemented(EtcdliteError):
    """The server does not know the method, or does not implement it."""

    code = _etcd.UNIMPLEMENTED


class Unavailable(EtcdliteError):
    """The member cannot serve this now; another one, or this one later, may."""

    code = _etcd.UNAVAILABLE


# fmt: off
class NoLeader(Unavailable): ...
class LeaderChanged(Unavailable): ...
class Stopped(Unavailable): ...
class Unhealthy(Unavailable): ...
class NotSupportedForLearner(Unavailable): ...
# fmt: on


class ServerTimeout(
    Unavailable,
    names=(
        "TimeoutWaitAppliedIndex",
        "TimeoutDueToConnectionLost",
        "TimeoutDueToLeaderFail",
        "Timeout",
    ),
):
    """The cluster did not agree in time. A write may or may not have been carried out."""


class Compacted(EtcdliteError):
    """The requested history is gone."""

    compact_revision: int
    """The oldest revision that is left; 0 if unknown."""

    def __init__(self, *about: Any, compact_revision: int = 0, **more: Any) -> None:
        """`about` and `more` as for any EtcdliteError."""
        super().__init__(*about, **more)
        self.compact_revision = compact_revision


# fmt: off
class FutureRev(EtcdliteError): ...
class EmptyKey(EtcdliteError): ...
class KeyNotFound(EtcdliteError): ...
class ValueProvided(EtcdliteError): ...
class LeaseProvided(EtcdliteError): ...
class TooManyOps(EtcdliteError): ...
class DuplicateKey(EtcdliteError): ...
class InvalidSortOption(EtcdliteError): ...
class NoSpace(EtcdliteError): ...
class RequestTooLarge(EtcdliteError): ...
class RequestTooManyRequests(EtcdliteError): ...
class LeaseNotFound(EtcdliteError): ...
class LeaseExist(EtcdliteError): ...
class LeaseTTLTooLarge(EtcdliteError): ...
class WatchCanceled(EtcdliteError): ...
class MemberExist(EtcdliteError): ...
class PeerURLExist(EtcdliteError): ...
class MemberNotEnoughStarted(EtcdliteError): ...
class MemberBadURLs(EtcdliteError): ...
class MemberNotFound(EtcdliteError): ...
class MemberNotLearner(EtcdliteError): ...
class LearnerNotReady(EtcdliteError): ...
class TooManyLearners(EtcdliteError): ...
class NotLeader(EtcdliteError): ...
class BadLeaderTransferee(EtcdliteError): ...
class NotCapable(EtcdliteError): ...
class Corrupt(EtcdliteError): ...
class AuthFailed(EtcdliteError): ...
class AuthNotEnabled(EtcdliteError): ...
class InvalidAuthToken(EtcdliteError): ...
class AuthOldRevision(EtcdliteError): ...
class UserEmpty(EtcdliteError): ...
class PermissionDenied(EtcdliteError): ...
class UserNotFound(EtcdliteError): ...
class UserAlreadyExist(EtcdliteError): ...
class RoleNotFound(EtcdliteError): ...
class RoleAlreadyExist(EtcdliteError): ...
class Canceled(EtcdliteError): ...
class DeadlineExceeded(EtcdliteError): ...
# fmt: on


_BY_TEXT["auth: revision in header is old"] = AuthOldRevision  # etcd 3.5, about a JSON Web Token.
_BY_CODE = {_etcd.UNAVAILABLE: Unavailable, _etcd.UNIMPLEMENTED: Unimplemented}


def error_for(code: int, text: str, endpoint: str = "") -> EtcdliteError:
    """The exception for a server's answer: chosen by the text, else by the code. If the
    text begins with "rpc error: code = NAME desc = ", as for a refused watch, that is removed."""
    text = text.rpartition(" desc = ")[2]
    return (_BY_TEXT.get(text) or _BY_CODE.get(code, EtcdliteError))(code, text, endpoint)


def part(response: Any, name: str = "header") -> Any:
    """The message `name` in a response. Raises ProtocolViolation if the server left it out."""
    if (found := getattr(response, name)) is None:
        raise ProtocolViolation(text=f"the server's answer has no {name}, which etcd always sends")
    return found


# Every class. Type checkers do not evaluate this, and see no list: for them everything is exported.
globals()["__all__"] = [name for name, value in globals().items() if isinstance(value, type)]
