"""What every command of etcdlite-ctl works with: the connection, the output, the progress line.

Invariants: the connection is made when it is first needed; results go to standard output as bytes
and at once; standard error gets whole lines, and the progress line only if it is a terminal.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etcdlite.cli.failures import EXIT_BAD_FEATURE, BadArguments, Failure, say
from etcdlite.cli.flags import unreadable_file_hint
from etcdlite.cli.output import Printer, join_lines
from etcdlite.client import Client, ConnectionFailed, EtcdliteError, Timeout
from etcdlite.errors import ERRORS
from etcdlite.methods import METHOD_BY_NAME
from etcdlite.notation import parse_hexadecimal, parse_int

PROGRESS_INTERVAL_S = 0.2

WHY_TIMEOUT_S = 1.0
"""For the question why another request was not answered."""

MEMBER_ID_CHARS = 16
"""A word of another length may be the name of a member. (IDs are printed without leading zeros:
one in 16 is shorter.)"""

WARN_DAYS = 30
"""A certificate that ends sooner is worth a warning."""

_ADVICE = {
    "UserEmpty": "; authentication is enabled: name a user with --user",
    "RootUserNotExist": "; make it first: etcdlite-ctl user add root",
}
"""What to do next, by the name of the server's error."""

LONG_WORK = {"KV.Compact": True, "Maintenance.Defragment": True, "Maintenance.HashKV": False}
"""What may take minutes, and whether it goes on if the command does not wait for its end."""

NO_ANSWER_TEXTS = ("etcdserver: request timed out", "etcdserver: no leader")


class Session:
    """A command's arguments and flags, connection and output."""

    def __init__(self, arguments: list[str], before_dashes: int, flags: Mapping[str, Any]) -> None:
        """`before_dashes`: how many arguments precede "--", or -1."""
        self.arguments = arguments
        self.before_dashes = before_dashes
        self.flags = flags
        self.timeout_s: float = flags["command-timeout"]
        self.dial_timeout_s: float = flags["dial-timeout"]
        if self.dial_timeout_s <= 0:
            # No limit of its own, as in etcdctl.
            self.dial_timeout_s = self.timeout_s
        self.printer = Printer(
            flags["write-out"], flags["hex"], bool(flags.get("print-value-only"))
        )
        self._client: Client | None = None
        self._typed_password: str | None = None
        self._endpoints: tuple[str, ...] = () if flags["discovery-srv"] else flags["endpoints"]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Those of --endpoints, or those that DNS names, which is queried when first needed."""
        if not self._endpoints:
            from etcdlite.discovery import client_endpoints

            domain, name = self.flags["discovery-srv"], self.flags["discovery-srv-name"]
            found = client_endpoints(domain, name)
            if not self.flags["insecure-discovery"]:
                for url in found:
                    if url.startswith("http://"):
                        say(f'ignoring discovered insecure endpoint "{url}"')
                found = [url for url in found if not url.startswith("http://")]
                if not found:
                    text = f"DNS names no endpoint with TLS for {domain} (--insecure-discovery)"
                    raise Failure(text)
            self._endpoints = tuple(found)
        return self._endpoints

    def use_endpoints(self, endpoints: Sequence[str]) -> None:
        """Connect to these instead, from now on."""
        self.close()
        self._client, self._endpoints = None, tuple(endpoints)

    def client(self) -> Client:
        """The connection to the first endpoint that answers, made when it is first needed."""
        if self._client is None:
            self._client = self.client_for(self.endpoints)
        return self._client

    def client_for(
        self, endpoints: Sequence[str], *, logs_in: bool = True, limit_s: float = math.inf
    ) -> Client:
        """A connection that the caller closes. `logs_in`: as the user of --user, if there is one.
        `limit_s`: the longest of its timeouts."""
        if self.timeout_s <= 0:
            raise Failure("context deadline exceeded (--command-timeout is not above 0)")
        connection = self.connection(endpoints)
        if not logs_in:
            connection |= {"user": "", "password": ""}
        for name in ("timeout_s", "dial_timeout_s"):
            connection[name] = min(connection[name], limit_s)
        try:
            return Client(**connection)
        except ValueError as error:
            raise BadArguments(str(error)) from None

    def connection(self, endpoints: Sequence[str]) -> dict[str, Any]:
        """The arguments of a client that say how to connect. Raises BadArguments."""
        flags = self.flags
        urls = list(map(dialled, endpoints))
        if not flags["insecure-transport"]:
            for url in urls:
                if url.startswith("http://"):
                    text = f"--insecure-transport=false does not allow {url}: write https://"
                    raise BadArguments(text)
            urls = [url if "://" in url else f"https://{url}" for url in urls]
        # A name server could name any host: what counts is the domain that the user gave.
        is_checked = flags["discovery-srv"] and not flags["insecure-discovery"]
        return {
            "endpoints": urls,
            "cacert": flags["cacert"],
            "cert": flags["cert"],
            "key": flags["key"],
            "insecure_skip_tls_verify": flags["insecure-skip-tls-verify"],
            "server_name": flags["discovery-srv"] if is_checked else "",
            "secret_file": flags["secret-file"],
            "user": self.user,
            "password": self._password(),
            "timeout_s": self.timeout_s,
            "dial_timeout_s": self.dial_timeout_s,
        }

    @property
    def user(self) -> str:
        """The name in --user."""
        given: str = self.flags["user"]
        return given if self.flags["password"] else given.partition(":")[0]

    def _password(self) -> str:
        """That of --password or --user, or the one that is typed when it is first needed."""
        if self._typed_password is None:
            user, colon, password = self.flags["user"].partition(":")
            password = self.flags["password"] or password
            if user and not (colon or password):
                password = ask_password("Password: ")
            self._typed_password = password
        return self._typed_password

    def ask(self, method: str, client: Client | None = None, **fields: Any) -> Any:
        """The response to a request of these fields. Raises EtcdliteError."""
        return self.call(method, METHOD_BY_NAME[method].request(**fields), client)

    def call(self, method: str, request: Any, client: Client | None = None) -> Any:
        """The response to a request. Raises EtcdliteError."""
        client = client or self.client()
        started_s = time.monotonic()
        try:
            return client.call(method, request)
        except Timeout as error:
            if method in LONG_WORK:
                goes_on = "if it has begun, it goes on there; " if LONG_WORK[method] else ""
                error.text += f"; {goes_on}--command-timeout waits longer"
            raise
        finally:
            if self.flags["debug"]:
                took_ms = (time.monotonic() - started_s) * 1000
                say(f"debug: {method} to {client.endpoint}, {took_ms:.1f} ms: {request}")

    def check_format(self, kind: str, what: str) -> None:
        """Refuse an output format that this kind of response does not have. `what` prints it."""
        if not self.printer.supports(kind):
            text = f"{self.printer.format} not supported as output format of {what}"
            raise Failure(text, EXIT_BAD_FEATURE)

    def show(self, kind: str, response: Any, *more: Any) -> None:
        """Print a response in the format that the user asked for (`output.PRINTERS`)."""
        self.write(self.printer.show(kind, response, *more))

    def write(self, output: bytes) -> None:
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()

    def print(self, *lines: str | bytes) -> None:
        """Print lines on standard output."""
        self.write(join_lines(lines))

    def need(self, count: int, text: str) -> list[str]:
        """The arguments. Refuses any other number of them than `count`."""
        if len(self.arguments) != count:
            raise BadArguments(text)
        return self.arguments

    def optional(self, text: str) -> str | None:
        """The only argument, or None. Refuses more than one."""
        if len(self.arguments) > 1:
            raise BadArguments(text)
        return self.arguments[0] if self.arguments else None

    def refuse(self, why: str, *names: str) -> None:
        """Refuse flags that have no effect here."""
        for name in names:
            if self.flags[name]:
                raise BadArguments(f"--{name} {why}")

    def member_argument(self) -> int:
        (argument,) = self.need(1, "member ID is not provided")
        try:
            return self.member_id(argument)
        except ValueError as error:
            raise BadArguments(f"bad member ID arg ({error}), expecting ID in Hex") from None

    def member_id(self, text: str) -> int:
        """The ID that `text` is in hexadecimal, as etcdctl takes it, or the ID of the member with
        that name. Raises ValueError for what is neither."""
        if len(text) == MEMBER_ID_CHARS:
            return parse_hexadecimal(text)
        members = self.ask("Cluster.MemberList", linearizable=True).members
        named = [member.ID for member in members if member.name == text]
        try:
            found = parse_hexadecimal(text)
        except ValueError as error:
            if not named:
                why = f"{error}, and no member has that name; one that never started has only an ID"
                raise ValueError(why) from None
        else:
            if not named or found in [member.ID for member in members]:
                return found
        if len(named) > 1:
            raise ValueError(f"{len(named)} members are called {text}")
        return int(named[0])

    def lease_argument(self, name: str) -> int:
        what = "1 argument" if name == "revoke" else "lease ID as argument"
        (argument,) = self.need(1, f"lease {name} command needs {what}")
        try:
            return parse_int(argument, 16)
        except ValueError as error:
            raise BadArguments(f"bad lease ID arg ({error}), expecting ID in Hex") from None

    def why_unanswered(self, error: EtcdliteError | BadArguments) -> str:
        """What may be behind `error`: that there is no leader, as the member says, that no server
        runs here, or that other options are needed. Else empty."""
        if isinstance(error, ConnectionFailed) and re.search("TLS|secret", error.text):
            return "" if self.flags["config-file"] else unreadable_file_hint()
        is_named = self.flags["names-server"]
        if not is_named and f"{self.endpoints[0]}: connection refused" in error.text:
            return "; is the server running (systemctl status etcdlite)? --endpoints names another"
        if not isinstance(error, Timeout) and not error.text.startswith(NO_ANSWER_TEXTS):
            return ""
        try:
            endpoint = [getattr(error, "endpoint", "") or self.client().endpoint]
            with self.client_for(endpoint, logs_in=False, limit_s=WHY_TIMEOUT_S) as client:
                status = self.ask("Maintenance.Status", client)
        except (EtcdliteError, BadArguments):
            return ""
        reasons = [text for text in status.errors if "no leader since" in text]
        if status.leader or not reasons:
            return ""
        return f": {reasons[0].removeprefix('etcdlite: ')}; see endpoint status --cluster"

    def warn_of_end(self, ends_s: float | None, whose: str) -> None:
        """Print a warning if a certificate ends soon (Unix time)."""
        if ends_s is not None and (left_s := ends_s - time.time()) < WARN_DAYS * 86_400:
            day = time.strftime("%Y-%m-%d", time.gmtime(ends_s))
            days = f"in {left_s // 86_400:.0f} days" if left_s > 0 else "it has ended"
            say(f"Warning: the certificate of {whose} ends on {day} ({days}): renew it")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def input_line() -> str:
    """The next line of standard input, without its end; what follows is left for commands."""
    return sys.stdin.buffer.readline().decode("utf-8", "surrogateescape").rstrip("\r\n")


def ask_password(prompt: str) -> str:
    """What is typed on the terminal, without echo; where there is none, a line of standard input,
    which etcdctl always reads. Raises BadArguments."""
    import getpass

    if not sys.stdin.isatty():
        # The file exists also where the process has no terminal.
        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        except OSError:
            if password := input_line():
                return password
            raise BadArguments(
                "failed to ask password: there is no terminal. Set ETCDLITE_CTL_PASSWORD, or for "
                "the password of a new user give --interactive=false and write it to standard input"
            ) from None
    try:
        return getpass.getpass(prompt)
    except (EOFError, OSError) as error:
        raise BadArguments(f"failed to ask password: {str(error) or 'nothing was typed'}") from None


def dialled(endpoint: str) -> str:
    """The endpoint with localhost in place of an empty host: ":2379", as Go programs write it."""
    scheme, separator, address = endpoint.rpartition("://")
    has_no_host = address.startswith(":") and address.count(":") == 1
    return f"{scheme}{separator}localhost{address}" if has_no_host else endpoint


def describe(error: EtcdliteError, endpoint: str = "") -> str:
    """The error in one line that names the endpoint and, where that helps, what to do next."""
    endpoint = error.endpoint or endpoint
    if not endpoint or endpoint in error.text:
        return error.text
    return f"{error.text} (endpoint {endpoint}{advice(error.text)})"


def advice(text: str) -> str:
    """What to do about an error of the server; empty if its text says enough."""
    return next((what for name, what in _ADVICE.items() if text.endswith(ERRORS[name][1])), "")


def cause(error: EtcdliteError | BadArguments) -> str:
    """The error without the endpoint, for a line that already names it."""
    return error.text.removeprefix(f"{getattr(error, 'endpoint', '')}: ")


class Progress:
    """A line on standard error about long work, drawn only on a terminal; `with` clears it."""

    def __init__(self, label: str, show: Callable[[int], str] = str) -> None:
        """`show`: for `done` and `total`."""
        self._label = label
        self._show = show
        self._is_drawn = sys.stderr.isatty()
        self._next_s = 0.0

    def update(self, done: int, total: int) -> None:
        """`total` is 0 if unknown."""
        now_s = time.monotonic()
        if not self._is_drawn or now_s < self._next_s:
            return
        self._next_s = now_s + PROGRESS_INTERVAL_S
        text = f"{self._label}: {self._show(done)}"
        if total:
            text += f" / {self._show(total)}  {100 * done / total:.0f}%"
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
