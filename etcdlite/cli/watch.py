"""`etcdlite-ctl watch`: any number of watches on one stream, from the command line or from lines.

The thread that reads the stream prints events and runs commands; in interactive mode the main
thread reads lines at the same time. When the connection breaks, a new stream resumes each watch
after the last revision that it has seen, so no event is missed or repeated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from etcdlite import proto
from etcdlite.cli.failures import EXIT_BAD_INPUT, EXIT_INTERRUPTED, BadArguments, Failure, say
from etcdlite.cli.flags import parse_flags, variable
from etcdlite.cli.requests import split_words
from etcdlite.cli.session import Session, advice, describe
from etcdlite.cli.table import WATCH_FLAGS
from etcdlite.client.calls import BACKOFF_FIRST_S, BACKOFF_MAX_S
from etcdlite.client.errors import Compacted, EtcdliteError, error_for, part
from etcdlite.client.operations import prefix_range
from etcdlite.errors import UNAVAILABLE, UNKNOWN
from etcdlite.notation import quote


class Watch:
    """One watch on the stream: its request, which also says where to resume, and its command."""

    def __init__(self, request: Any, command: Sequence[str]) -> None:
        self.request = request
        self.command = command

    def advance(self, response: Any) -> None:
        """Resume after this response."""
        if not response.created or self.request.start_revision == 0:
            # One without events says that all up to its revision have come.
            to = response.events[-1].kv.mod_revision if response.events else part(response).revision
            self.request.start_revision = max(self.request.start_revision, to + 1)


def parse_watch(
    arguments: Sequence[str],
    before_dashes: int,
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Watch:
    """`[key [range_end]] [-- command ...]`; the key may come from the environment."""
    command: Sequence[str] = ()
    if before_dashes >= 0:
        arguments, command = arguments[:before_dashes], arguments[before_dashes:]
        if not command:
            raise BadArguments("bad number of arguments (no command after --)")
    if key_variable := variable(environment, "watch-key"):
        if arguments:
            raise BadArguments("bad number of arguments (found conflicting environment key)")
        end_variable = variable(environment, "watch-range-end")
        arguments = [key_variable[1], *([end_variable[1]] if end_variable else [])]
    if not 1 <= len(arguments) <= 2:
        raise BadArguments("bad number of arguments")
    if len(arguments) == 2 and flags["prefix"]:
        raise BadArguments("`range_end` and `--prefix` are mutually exclusive")
    key = os.fsencode(arguments[0])
    range_end = os.fsencode(arguments[1]) if len(arguments) == 2 else b""
    if flags["prefix"]:
        key, range_end = prefix_range(key)
    request = proto.WatchCreateRequest(
        key=key,
        range_end=range_end,
        start_revision=flags["rev"],
        prev_kv=flags["prev-kv"],
        progress_notify=flags["progress-notify"],
    )
    return Watch(request, command)


class Watcher:
    """All watches of a `watch` command: one stream, reopened when its connection breaks."""

    def __init__(self, session: Session, is_interactive: bool) -> None:
        self._session = session
        self._is_interactive = is_interactive
        self._lock = threading.Lock()
        self._watches: dict[int, Watch] = {}
        self._last_id = 0
        self._stream: Any = None

    def add(self, watch: Watch) -> None:
        with self._lock:
            self._last_id += 1
            watch.request.watch_id = self._last_id
            self._watches[self._last_id] = watch
            if self._stream is not None:
                self._send(proto.WatchRequest(create_request=watch.request))

    def ask_progress(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._send(proto.WatchRequest(progress_request=proto.WatchProgressRequest()))

    def _send(self, request: Any) -> None:
        # If the connection is broken, the reader finds out and reopens all watches.
        with contextlib.suppress(EtcdliteError):
            self._stream.send(request)

    def run(self) -> None:
        """Print events until a watch is canceled. Raises EtcdliteError if it cannot start."""
        wait_s = BACKOFF_FIRST_S
        has_worked = False
        while True:
            try:
                with self._opened() as stream:
                    for response in stream:
                        has_worked = True
                        wait_s = BACKOFF_FIRST_S
                        self._handle(response)
            except EtcdliteError as error:
                if not has_worked or error.code != UNAVAILABLE:
                    raise
                if wait_s == BACKOFF_FIRST_S:
                    say(f"watch: {describe(error, self._session.client().endpoint)}; reconnecting")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, BACKOFF_MAX_S)

    def _opened(self) -> Any:
        """A new stream, with the requests of all watches sent."""
        with self._lock:
            self._stream = self._session.client().stream("Watch.Watch")
            for watch in self._watches.values():
                self._stream.send(proto.WatchRequest(create_request=watch.request))
            return self._stream

    def _handle(self, response: Any) -> None:
        session = self._session
        # The response to a progress request is for all watches: its watch_id is -1.
        watch = self._watches.get(response.watch_id)
        if response.created and not response.canceled:
            if watch is not None:
                watch.advance(response)
            return
        if response.canceled or response.compact_revision:
            self._end(response)
            return
        if not response.events:
            session.print(f"progress notify: {part(response).revision}")
        if watch is not None:
            watch.advance(response)
        session.show("watch", response)
        if watch is not None and watch.command:
            for event in response.events:
                self._run_command(watch.command, event, part(response).revision)

    def _end(self, response: Any) -> None:
        """Report a watch that the server canceled. Raises Failure unless in interactive mode."""
        session = self._session
        if session.printer.format != "simple":
            session.show("watch", response)
        failure = error_for(UNKNOWN, response.cancel_reason or "watch canceled")
        reason = Compacted.text if response.compact_revision else failure.text
        endpoint = session.client().endpoint
        text = f"watch is canceled by the server: {reason} (endpoint {endpoint}{advice(reason)})"
        if not self._is_interactive:
            raise Failure(text, EXIT_INTERRUPTED)
        say(f"Error: {text}")
        with self._lock:
            self._watches.pop(response.watch_id, None)

    def _run_command(self, command: Sequence[str], event: Any, revision: int) -> None:
        is_delete = event.type == proto.Event.DELETE
        environment = {
            **os.environ,
            "ETCD_WATCH_REVISION": str(revision),
            "ETCD_WATCH_EVENT_TYPE": '"DELETE"' if is_delete else '"PUT"',
            "ETCD_WATCH_KEY": quote(event.kv.key),
            "ETCD_WATCH_VALUE": quote(event.kv.value),
        }
        try:
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, env=environment, check=False
            ).returncode
            cause = f"exit status {status}" if status else ""
        except (OSError, ValueError) as error:  # ValueError: a word has a NUL.
            cause = f"exec {command[0]}: {getattr(error, 'strerror', error)}"
        if cause:
            words = " ".join(quote(os.fsencode(word)) for word in command)
            raise Failure(f"command [{words}] error ({cause})")


def watch(session: Session) -> None:
    watcher = Watcher(session, session.flags["interactive"])
    if session.flags["interactive"]:
        _watch_interactively(watcher)
    watcher.add(parse_watch(session.arguments, session.before_dashes, session.flags, os.environ))
    watcher.run()


def _watch_interactively(watcher: Watcher) -> NoReturn:
    """Read lines `watch [flags] key [range_end] [-- command]` or `progress` from standard input."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            watcher.run()
        except Exception as error:  # Of any kind: it is raised again in the main thread.
            failed.append(error)
            # Only a signal ends the read of the main thread. Background jobs ignore SIGINT.
            os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    defaults = {flag.name: flag.default for flag in WATCH_FLAGS}
    reader: threading.Thread | None = None
    try:
        for line in iter(sys.stdin.buffer.readline, b""):
            text = os.fsdecode(line).strip()
            try:
                words = split_words(text)
                if words[:1] == ["progress"]:
                    watcher.ask_progress()
                    continue
                if words[:1] != ["watch"]:
                    raise ValueError("watch and progress supported")
                arguments, before_dashes, given = parse_flags(words[1:], WATCH_FLAGS)
                watcher.add(parse_watch(arguments, before_dashes, defaults | given, os.environ))
            except (ValueError, Failure) as error:
                say(f"Invalid command {text} ({error})")
                continue
            if reader is None:
                reader = threading.Thread(target=run, daemon=True)
                reader.start()
    except KeyboardInterrupt:
        if failed:
            raise failed[0] from None
        raise
    raise Failure("error reading watch request line: EOF", EXIT_BAD_INPUT)
