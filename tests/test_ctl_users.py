"""Users and roles on the command line beside etcdctl, and the logins of the Python clients."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl_runner import Ended, run_ctl
from rigs.ports import free_ports
from rigs.processes import PATIENCE_S, ServerFactory, ServerProcess, wait_until
from rigs.real_etcd import running_etcd
from test_ctl_live import PATIENT as PATIENT_CTL
from test_ctl_live import ctl_of, etcdctl

from etcdlite import proto
from etcdlite.client import AsyncClient, Client
from etcdlite.client.errors import (
    AuthFailed,
    PermissionDenied,
    UserEmpty,
)

ROOT = "--user root:rootpw "
ALICE = "--user alice:pw "

# (status, command line, standard input), in order.
COMMANDS: list[tuple[int, str, str]] = [
    (0, "auth status", ""),
    (1, "auth enable", ""),
    (128, "auth enable now", ""),
    (128, "user add", ""),
    (128, "user add :x", ""),
    (0, "user add root:rootpw", ""),
    (1, "user add root:again", ""),
    (0, "user add alice --new-user-password=pw", ""),
    (0, "user add bob:pw -w json", ""),
    (0, "user add carol --no-password -w fields", ""),
    (0, "user add dave --interactive=false", "secret words\n"),
    (0, "user list", ""),
    (0, "user list -w json", ""),
    (1, "user get nobody", ""),
    (0, "role add r1", ""),
    (1, "role add r1", ""),
    (0, "role add r2 -w json", ""),
    (128, "role add", ""),
    (128, "role grant-permission r1 read", ""),
    (128, "role grant-permission r1 reads k", ""),
    (0, "role grant-permission r1 read k", ""),
    (0, "role grant-permission r1 write /p/ --prefix", ""),
    (0, "role grant-permission r1 readwrite /f/ --from-key", ""),
    (0, "role grant-permission r1 Read a z", ""),
    (0, "role grant-permission r2 READ '' --prefix", ""),
    (0, "role grant-permission r2 read ''", ""),
    (128, "role grant-permission r1 read x y --prefix", ""),
    (128, "role grant-permission r1 read x --prefix --from-key", ""),
    (1, "role grant-permission nor read x", ""),
    (0, "role get r1", ""),
    (0, "role get r1 -w fields", ""),
    (0, "role get r1 -w json", ""),
    (0, "role get r2", ""),
    (1, "role get nor", ""),
    (0, "role list", ""),
    (0, "role list -w fields", ""),
    (0, "user grant-role alice r1", ""),
    (1, "user grant-role nobody r1", ""),
    (1, "user grant-role alice nor", ""),
    (128, "user grant-role alice", ""),
    (0, "user grant-role alice r2 -w fields", ""),
    (0, "user get alice", ""),
    (0, "user get alice -w json", ""),
    (0, "user get alice --detail", ""),
    (0, "user revoke-role alice r2", ""),
    (1, "user revoke-role alice r2", ""),
    (0, "role revoke-permission r1 k", ""),
    (1, "role revoke-permission r1 k", ""),
    (0, "role revoke-permission r1 a z", ""),
    (0, "role revoke-permission r1 /f/ --from-key", ""),
    (0, "user passwd bob --interactive=false", "new\n"),
    (0, "user delete dave", ""),
    (1, "user delete dave", ""),
    (0, "role delete r2", ""),
    (1, "role delete r2", ""),
    (0, "auth enable", ""),
    (1, "auth status", ""),
    (0, ROOT + "auth status", ""),
    (0, ROOT + "auth status -w json", ""),
    (2, "--user root:wrong auth status", ""),
    (2, "--user nobody:pw get k", ""),
    (0, ALICE + "put /p/1 v", ""),
    (1, ALICE + "get /p/1", ""),
    (0, "--user alice --password pw put /p/2 v", ""),
    (0, ALICE + "del /p/ --prefix", ""),
    (1, ALICE + "put /q/1 v", ""),
    (1, "--user bob:new get k", ""),
    (0, ALICE + "user get alice", ""),
    (1, ALICE + "user get root", ""),
    (1, ALICE + "user list", ""),
    (0, ALICE + "role get r1", ""),
    (0, ALICE + "lease list", ""),
    (1, ROOT + "user delete root", ""),
    (1, ROOT + "user revoke-role root root", ""),
    (1, ROOT + "role delete root", ""),
    (0, ROOT + "endpoint health", ""),
    (0, ROOT + "auth disable", ""),
    (0, "auth status", ""),
    (0, ALICE + "get k", ""),
]

_MASKS = [
    (r'"(cluster_id|member_id|raft_term)":\d+', r'"\1":N'),
    (r'"(ClusterID|MemberID|RaftTerm)" : \d+', r'"\1" : N'),
    (r"127\.0\.0\.1:\d+", "ENDPOINT"),
    (r"took = [\d.]+\S+", "took"),
    # The endpoint, and what to do next: etcdctl says neither.
    (r" \(endpoint ENDPOINT(; [^)]*)?\)", ""),
]


def _shown(ended: Ended) -> tuple[int, str, str]:
    """The status, what is printed, and the error, without what differs between two clusters and
    without the lines of etcdctl's own log."""
    out, err = ended.stdout.decode(), ended.stderr
    for pattern, mask in _MASKS:
        out, err = re.sub(pattern, mask, out), re.sub(pattern, mask, err)
    errors = [line for line in err.splitlines() if not line.startswith('{"level"')]
    return ended.status, out, "\n".join(errors)


def test_output_and_status_are_etcdctls(tmp_path: Path, server: ServerFactory) -> None:
    ours = ctl_of(server().endpoint)
    different = []
    with running_etcd(tmp_path / "etcd") as endpoint:
        theirs = etcdctl(endpoint)
        for status, line, stdin in COMMANDS:
            words = ["" if word == "''" else word for word in line.split()]
            one = _shown(ours(*words, stdin=stdin.encode()))
            other = _shown(theirs(*words, stdin=stdin.encode()))
            if one != other or one[0] != status:
                different.append(f"{line} ({status})\n  ours   {one}\n  theirs {other}")
    assert not different, "\n".join(different)


def test_a_password_is_asked_for_only_where_it_is_needed(server: ServerFactory) -> None:
    running = server()
    asked: list[str] = []

    def typed(prompt: str) -> str:
        asked.append(prompt)
        return "pw"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("etcdlite.cli.session.ask_password", typed)
        patch.setattr("etcdlite.cli.users.ask_password", typed)
        run = ctl_of(running.endpoint)
        assert run("--user", "root", "version").status == 0
        assert asked == []
        assert run("user", "add", "root").status == 0
        assert asked == [
            "Password of root: ",
            "Type password of root again for confirmation: ",
        ]
        asked.clear()
        # Two connections, one question.
        enabled = run("--user", "root", "auth", "enable")
        assert (enabled.status, enabled.stderr) == (0, "")
        assert asked == ["Password: "]


def test_enabling_says_if_the_user_that_was_given_cannot_log_in(server: ServerFactory) -> None:
    run = ctl_of(server().endpoint)
    assert run("user", "add", "root:right").status == 0
    enabled = run("--user", "root:wrong", "auth", "enable")
    assert enabled.status == 0
    assert "root could not log in" in enabled.stderr and "wrong" not in enabled.stderr


# The Python clients.


@pytest.fixture
def guarded(server: ServerFactory) -> Iterator[ServerProcess]:
    """A server with auth enabled, and tokens that live for three seconds. Its users are root, and
    alice, who may read and write keys that begin with a. Its port is the same after a restart."""
    port = free_ports(1)[0]
    running = server("--auth-token-ttl=3", f"--listen-client-urls=http://127.0.0.1:{port}")
    run = ctl_of(running.endpoint)
    for line in (
        "user add root:rootpw",
        "user add alice:pw",
        "role add a",
        "role grant-permission a readwrite a --prefix",
        "user grant-role alice a",
        "auth enable",
    ):
        assert run(*line.split()).status == 0
    yield running


PATIENT = {"timeout_s": PATIENCE_S, "dial_timeout_s": PATIENCE_S}
"""A login takes long while the processor is busy: it gives way to everything else."""


def alice(server: ServerProcess, **more: Any) -> Client:
    options = {"password": "pw", **PATIENT, **more}
    return Client(server.endpoint, user="alice", **options)


def test_a_client_logs_in(guarded: ServerProcess) -> None:
    with alice(guarded) as client:
        client.put("a1", "v")
        assert client.get("a1").value == b"v"
        with pytest.raises(PermissionDenied):
            client.put("b1", "v")
    with alice(guarded, password="wrong") as client, pytest.raises(AuthFailed):
        client.get("a1")
    with Client(guarded.endpoint) as client, pytest.raises(UserEmpty):
        client.get("a1")


def test_a_client_logs_in_again_when_its_token_has_ended(guarded: ServerProcess) -> None:
    with alice(guarded) as client, alice(guarded) as watching:
        client.put("a1", "v")
        token = client._calls.login.token  # type: ignore[union-attr]
        watching.get("a1")

        def ended() -> bool:
            # Each use would extend it: ask on a connection of its own with nothing but the token.
            with Client(guarded.endpoint) as other:
                try:
                    request = proto.AuthenticateRequest(password=token)
                    other.call("Auth.Authenticate", request)
                except Exception:
                    return True
                return False

        # Unused, it ends after three seconds.
        time.sleep(3.2)
        wait_until(ended, "the token has ended")
        client.put("a2", "v")
        # The login of a watch, too.
        with watching.watch("a3") as watch:
            client.put("a3", "v")
            assert watch.next_event(10).kv.value == b"v"


def test_a_login_outlives_the_server_and_a_watch_goes_on(guarded: ServerProcess) -> None:
    with alice(guarded) as client, client.watch(prefix="a") as watch:
        client.put("a1", "1")
        assert watch.next_event(10).kv.value == b"1"
        guarded.kill()
        guarded.start()
        wait_until(lambda: bool(client.status()), "the client is connected again")
        client.put("a2", "2")
        assert watch.next_event(10).kv.value == b"2"


def test_users_that_are_enabled_later_are_logged_in_then(server: ServerFactory) -> None:
    running = server()
    with Client(running.endpoint, user="root", password="rootpw", **PATIENT) as client:
        client.put("k", "v")
        run = ctl_of(running.endpoint)
        assert run("user", "add", "root:rootpw").status == 0
        assert run("auth", "enable").status == 0
        client.put("k", "w")
        assert client.get("k").value == b"w"


def test_the_asyncio_client_logs_in(guarded: ServerProcess) -> None:
    async def main() -> None:
        async with AsyncClient(guarded.endpoint, user="alice", password="pw", **PATIENT) as client:
            await client.put("a1", "v")
            await asyncio.sleep(3.5)
            await client.put("a1", "w")
            with pytest.raises(PermissionDenied):
                await client.get("b")

    asyncio.run(main())


def test_a_lock_and_an_observed_election_work_for_a_user(guarded: ServerProcess) -> None:
    with alice(guarded) as client, client.lock("a-lock"):
        pass
    ended = run_ctl("--endpoints", guarded.endpoint, "--user", "alice:pw", "lock", "a-lock", "true")
    assert ended.status == 0, ended.stderr
    ended = run_ctl("--endpoints", guarded.endpoint, "--user", "alice:pw", "lock", "b", "true")
    assert ended.status != 0 and "permission denied" in ended.stderr


def test_errors_about_authentication_say_what_to_do(server: ServerFactory) -> None:
    run = ctl_of(server().endpoint)
    assert "etcdlite-ctl user add root" in run("auth", "enable").stderr
    assert run("user", "add", "root:pw").status == 0
    assert run("auth", "enable").status == 0
    for command in ("get a", "watch a", "snapshot save no.db"):
        refused = run(*command.split()).stderr
        assert "etcdserver: user name is empty" in refused
        assert "--user" in refused


def test_names_and_passwords_are_text(server: ServerFactory) -> None:
    ctl = ctl_of(server().endpoint)
    for words, stdin in (
        (("user", "add", "\udcff:pw"), b""),
        (("user", "add", "ann", "--interactive=false"), b"\xff\n"),
        (("role", "add", "\udcff"), b""),
        (("member", "add", "m2", "--peer-urls=http://\udcff:1"), b""),
        (("get", "a", "--user=\udcff:pw"), b""),
    ):
        ended = ctl(*words, stdin=stdin)
        assert (ended.status, ended.stdout) == (128, b""), words
        assert ended.stderr.startswith("Error: this must be text in UTF-8: "), words
        assert ended.stderr.count("\n") == 1


def test_a_password_of_several_words_is_taken_as_a_whole(guarded: ServerProcess) -> None:
    ctl = ctl_of(guarded.endpoint)
    root = ("--user", "root:rootpw")
    for words in (("user", "add", "dora"), ("user", "passwd", "dora")):
        text = f"a secret of {words[1]}"
        ended = ctl(*words, *root, "--interactive=false", stdin=f"{text}\n".encode())
        assert ended.status == 0, ended
        assert ctl("user", "get", "dora", "--user", "dora", "--password", text).status == 0
        assert ctl("user", "get", "dora", "--user", "dora", "--password", "a").status == 2


def test_no_user_gets_an_empty_password(server: ServerFactory) -> None:
    ctl = ctl_of(server().endpoint)
    for words in (("ann:",), ("ann", "--interactive=false")):
        ended = ctl("user", "add", *words)
        assert (ended.status, ended.stdout) == (128, b"") and "empty password" in ended.stderr
    assert ctl("user", "list").stdout == b""


def test_a_password_without_a_terminal_is_refused_in_one_line(server: ServerFactory) -> None:
    command = [sys.executable, "-m", "etcdlite.ctl", "--endpoints", server().endpoint]
    ended = subprocess.run(
        [*command, "--user", "ann", "get", "a"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert ended.returncode == 128
    assert ended.stderr.count("\n") == 1
    assert "there is no terminal. Set ETCDLITE_CTL_PASSWORD" in ended.stderr


def test_without_a_terminal_a_password_is_a_line_of_standard_input(server: ServerFactory) -> None:
    command = [sys.executable, "-m", "etcdlite.ctl", "--endpoints", server().endpoint]

    def run(*words: str, stdin: str = "") -> str:
        ended = subprocess.run(
            [*command, *words],
            input=stdin,
            capture_output=True,
            text=True,
            start_new_session=True,
            env={**os.environ, **PATIENT_CTL},
        )
        assert ended.returncode == 0, ended
        return ended.stdout

    run("user", "add", "root", stdin="a secret\na secret\n")
    run("auth", "enable")
    root = ("--user", "root")
    # The login comes after what the command itself reads.
    run(*root, "user", "add", "ann", "--interactive=false", stdin="of ann\na secret\n")
    assert run(*root, "put", "a", "1", stdin="a secret\n") == "OK\n"
    assert run("--user", "ann:of ann", "user", "get", "ann").startswith("User: ann\n")
