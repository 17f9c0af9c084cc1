"""A scripted random history of users with different rights, against etcdlite and against etcd 3.5
side by side: the same is allowed, the same is denied, with the same texts.

Left out is what etcd corrected after the version to compare with (`docs/auth.md`): requests without
a user to Compact, MemberList, Alarm and the lease methods; renewing and reading leases of others;
nested transactions, and previous values and leases in transactions; permissions with bad ranges.
"""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.ports import free_ports
from rigs.processes import ROOT, SMALL_FILES, ServerFactory, ServerProcess, wait_until
from rigs.real_etcd import running_etcd
from test_cluster_live import LiveCluster

from etcdlite import proto

USERS = ("root", "ann", "bob", "cyd")
ROLES = ("red", "green", "blue", "root")
LEASES = (11, 12, 13)
STEPS = 200
"""Of the history. Most of the time goes to passwords."""


class Side:
    """One of the two servers, over JSON."""

    def __init__(self, endpoint: str, tokens: dict[str, str] | None = None) -> None:
        self._endpoint = endpoint
        self.tokens = tokens or {}

    def ask(self, user: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The HTTP status and the answer, without what the two cannot have in common."""
        headers = {"Content-Type": "application/json"}
        if user:
            headers["Authorization"] = self.tokens.get(user, "none")
        request = urllib.request.Request(
            f"http://{self._endpoint}/v3/{path}", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                answer = json.load(response)
                status = response.status
        except urllib.error.HTTPError as failure:
            status, answer = failure.code, json.load(failure)
        header = answer.pop("header", {})
        if status == 200 and "revision" in header:
            answer["revision"] = header["revision"]
        if "token" in answer:
            self.tokens[body["name"]] = answer.pop("token")
        answer.pop("details", None)
        if status != 200:  # Left out by the gateway of Debian's etcd.
            answer.setdefault("error", answer["message"])
        return status, answer


def b64(key: str) -> str:
    return base64.b64encode(key.encode()).decode()


class Story:
    """Makes the requests of the history."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def key(self) -> str:
        return self.rng.choice("abcdef") + self.rng.choice(("", "1"))

    def span(self) -> dict[str, str]:
        """Key and range end."""
        first, last = self.key(), self.key()
        kind = self.rng.randrange(6)
        if kind < 3 or (kind == 3 and first >= last):
            return {"key": b64(first)}
        if kind == 3:
            return {"key": b64(first), "range_end": b64(last)}
        return {"key": b64(first), "range_end": b64("\0" if kind == 4 else first[:1] + "~")}

    def lease(self) -> str:
        return str(self.rng.choice(LEASES))

    def put(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"key": b64(self.key()), "value": b64("v")}
        return fields

    def op(self) -> dict[str, Any]:
        kind = self.rng.randrange(4)
        if kind == 0:
            return {"requestPut": self.put()}
        if kind == 1:
            return {"requestDeleteRange": {"key": b64(self.key())}}
        return {"requestRange": self.span()}

    def txn(self) -> dict[str, Any]:
        compare = [
            {"target": "CREATE", "result": "GREATER", "createRevision": "0", **self.span()}
            for _ in range(self.rng.randrange(2))
        ]
        return {
            "compare": compare,
            "success": [self.op() for _ in range(self.rng.randrange(1, 3))],
            "failure": [self.op() for _ in range(self.rng.randrange(2))],
        }

    def request(self) -> tuple[str, dict[str, Any]]:
        rng = self.rng
        user, role = rng.choice(USERS), rng.choice(ROLES)
        kind = rng.choices(("keys", "auth", "login", "other"), (60, 30, 12, 8))[0]
        if kind == "login":
            password = user if rng.random() < 0.8 else "wrong"
            return "auth/authenticate", {
                "name": rng.choice((user, user, "eve")),
                "password": password,
            }
        if kind == "keys":
            return rng.choice(
                (
                    ("kv/range", {**self.span(), "serializable": rng.random() < 0.3}),
                    ("kv/put", {**self.put(), "prev_kv": rng.random() < 0.3}),
                    ("kv/put", {**self.put(), "lease": self.lease()}),
                    ("kv/deleterange", {**self.span(), "prev_kv": rng.random() < 0.3}),
                    ("kv/txn", self.txn()),
                    ("kv/txn", {"success": [{"requestRange": self.span()}]}),
                )
            )
        if kind == "other":
            return rng.choice(
                (
                    ("lease/revoke", {"ID": self.lease()}),
                    ("lease/grant", {"ID": self.lease(), "TTL": "1000"}),
                    ("maintenance/defragment", {}),
                    ("cluster/member/remove", {"ID": "1"}),
                )
            )
        permission = {"permType": rng.choice(("READ", "WRITE", "READWRITE")), **self.span()}
        return rng.choice(
            (
                ("auth/enable", {}),
                ("auth/enable", {}),
                ("auth/disable", {}),
                ("auth/status", {}),
                ("auth/status", {}),
                ("auth/user/add", {"name": user, "password": user}),
                ("auth/user/add", {"name": user, "options": {"no_password": True}}),
                ("auth/user/delete", {"name": user}),
                ("auth/user/changepw", {"name": user, "password": user}),
                ("auth/user/get", {"name": user}),
                ("auth/user/list", {}),
                ("auth/user/grant", {"user": user, "role": role}),
                ("auth/user/grant", {"user": user, "role": role}),
                ("auth/user/revoke", {"name": user, "role": role}),
                ("auth/role/add", {"name": role}),
                ("auth/role/add", {"name": role}),
                ("auth/role/get", {"role": role}),
                ("auth/role/list", {}),
                ("auth/role/delete", {"role": role}),
                ("auth/role/grant", {"name": role, "perm": permission}),
                ("auth/role/grant", {"name": role, "perm": permission}),
                ("auth/role/grant", {"name": role, "perm": permission}),
                ("auth/role/grant", {"name": role}),
                ("auth/role/revoke", {"role": role, **self.span()}),
            )
        )


BEGINNING = [
    *(("auth/user/add", {"name": user, "password": user}) for user in USERS),
    *(("auth/role/add", {"name": role}) for role in ROLES),
    ("auth/user/grant", {"user": "root", "role": "root"}),
    *(
        ("auth/user/grant", {"user": user, "role": role})
        for user, role in zip(USERS[1:], ROLES, strict=False)
    ),
    *(
        ("auth/role/grant", {"name": role, "perm": {"permType": "READWRITE", **span}})
        for role, span in (
            ("red", {"key": b64("a"), "range_end": b64("c")}),
            ("red", {"key": b64("c"), "range_end": b64("d")}),
            ("green", {"key": b64("b"), "range_end": b64("\0")}),
            ("blue", {"key": b64("e")}),
        )
    ),
    ("auth/enable", {}),
]


@pytest.mark.parametrize("seed", range(1))
def test_a_random_history_of_users(tmp_path: Path, server: ServerFactory, seed: int) -> None:
    story = Story(seed)
    ours = Side(server().endpoint)
    counts: dict[int, int] = {}
    is_enabled = False
    with running_etcd(tmp_path / "etcd") as endpoint:
        theirs = Side(endpoint)
        for step in range(-len(BEGINNING), STEPS):
            if step < 0:
                user, (path, body) = "", BEGINNING[step]
            else:
                # More as root, so that the others can do something.
                user = story.rng.choice((*USERS, *USERS[1:], "root", ""))
                path, body = story.request()
                if not is_enabled:
                    user = ""  # etcd 3.5.1 refuses old tokens even then.
                elif not user and path.startswith("lease"):
                    continue
            expected = theirs.ask(user, path, body)
            found = ours.ask(user, path, body)
            if expected[1].get("message", "").endswith("password was given for no password user"):
                # Tells a stranger which users exist. Here it is a wrong password like any other.
                text = "etcdserver: authentication failed, invalid user ID or password"
                expected = (400, {"error": text, "message": text, "code": 3})
            if expected[1].get("message", "").startswith("auth: "):
                # Maintenance calls of etcd 3.5.1 forget to translate these errors.
                text = expected[1]["message"].replace("auth: ", "etcdserver: ")
                expected = (found[0], {"error": text, "message": text, "code": found[1]["code"]})
            assert found == expected, f"step {step}: {user or 'no one'}: {path} {body}"
            if expected[0] == 200 and path in ("auth/enable", "auth/disable"):
                is_enabled = path == "auth/enable"
            counts[expected[0]] = counts.get(expected[0], 0) + 1
    assert counts[200] > STEPS / 6 and counts[403] > STEPS / 20, counts


# A cluster.


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveCluster]:
    live = LiveCluster(tmp_path, 3, *SMALL_FILES)
    yield live
    live.close()


def test_users_of_a_cluster(live: LiveCluster, tmp_path: Path) -> None:
    """Tokens count at every member, also after restarts, and users come along with snapshots,
    backups and members that join."""
    sides = [Side(member.endpoint) for member in live.members.values()]
    first = sides[0]
    for path, body in BEGINNING[:-1]:
        assert first.ask("", path, body)[0] == 200, path
    assert first.ask("", "auth/enable", {})[0] == 200
    for user in ("root", "ann"):
        credentials = {"name": user, "password": user}
        assert first.ask("", "auth/authenticate", credentials)[0] == 200
        for number, side in enumerate(sides):
            side.tokens[user] = first.tokens[user]
            put = {"key": b64(f"a{user}{number}"), "value": b64("v" * 3000)}
            assert side.ask(user, "kv/put", put)[0] == 200
    for side in sides:
        assert side.ask("ann", "kv/put", {"key": b64("z")})[0] == 403
        assert side.ask("ann", "kv/range", {"key": b64("a"), "range_end": b64("d")})[0] == 200
        assert side.ask("ann", "kv/range", {"key": b64("a"), "range_end": b64("e")})[0] == 403
        assert side.ask("", "kv/put", {"key": b64("a")})[0] == 400
        # Of the questions to the leader.
        assert side.ask("ann", "cluster/member/remove", {"ID": "1"})[0] == 403
        assert "member not found" in str(side.ask("root", "cluster/member/remove", {"ID": "1"}))
    assert first.ask("root", "lease/grant", {"ID": "11", "TTL": "100"})[0] == 200
    assert first.ask("root", "kv/put", {"key": b64("z"), "lease": "11"})[0] == 200
    for side in sides:
        assert side.ask("ann", "lease/timetolive", {"ID": "11", "keys": True})[0] == 403
        assert side.ask("root", "lease/timetolive", {"ID": "11", "keys": True})[0] == 200
        assert side.ask("ann", "lease/timetolive", {"ID": "11"})[0] == 200

    # A member that was away gets the rest as a snapshot; then all are restarted.
    away = live.follower()
    away.kill()
    others = [Side(member.endpoint) for member in live.running]
    for side in others:
        side.tokens = first.tokens
    assert others[0].ask("root", "auth/user/revoke", {"name": "ann", "role": "red"})[0] == 200
    for number in range(60):
        others[0].ask("root", "kv/put", {"key": b64(f"k{number % 5}"), "value": b64("v" * 9000)})
    away.start()
    for member in live.members.values():
        if member is not away:
            member.restart()
    for member in live.members.values():
        side = Side(member.endpoint)
        side.tokens = first.tokens

        def is_refused(side: Side = side) -> bool:
            return side.ask("ann", "kv/put", {"key": b64("a")})[0] == 403

        wait_until(is_refused, f"{member.data_dir.name} knows what ann may; {member.tail()}")
        assert side.ask("root", "kv/put", {"key": b64("a")})[0] == 200
        status = side.ask("root", "auth/status", {})[1]
        assert status["authRevision"] == "18" and status["enabled"]

    # A member that joins has them, too.
    (port,) = free_ports(1)
    peer_url = f"http://127.0.0.1:{port}"
    asked = {"peerURLs": [peer_url]}
    some = Side(live.running[0].endpoint, first.tokens)

    def add() -> Any:
        """Refused until the members are connected for 5 seconds."""
        status, answer = some.ask("root", "cluster/member/add", asked)
        return answer if status == 200 else None

    added = wait_until(add, "a member is added")
    initial = [f"{m['name']}={m['peerURLs'][0]}" for m in added["members"] if m.get("name")]
    joined = ServerProcess(
        tmp_path / "m4",
        [
            "--name=m4",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster={','.join([*initial, f'm4={peer_url}'])}",
            "--initial-cluster-state=existing",
        ],
        (sys.executable, "-m", "etcdlite"),
    )
    live.members["m4"] = joined.start()
    side = Side(joined.endpoint, first.tokens)
    assert side.ask("root", "kv/put", {"key": b64("a")})[0] == 200
    assert side.ask("ann", "kv/put", {"key": b64("a")})[0] == 403
    assert side.ask("", "kv/put", {"key": b64("a")})[0] == 400

    # A backup holds the users.
    saved = tmp_path / "backup.db"
    url = f"http://{live.running[0].endpoint}/v3/maintenance/snapshot"
    headers = {"Authorization": first.tokens["root"], "Content-Type": "application/json"}
    parts = []
    with urllib.request.urlopen(urllib.request.Request(url, b"{}", headers)) as response:
        for line in response:
            parts.append(base64.b64decode(json.loads(line)["result"].get("blob", "")))
    saved.write_bytes(b"".join(parts))
    restored = tmp_path / "restored"
    command = [sys.executable, "-m", "etcdlite.ctl", "snapshot", "restore", str(saved)]
    subprocess.run([*command, f"--data-dir={restored}"], check=True, cwd=ROOT, capture_output=True)
    alone = ServerProcess(restored, [], (sys.executable, "-m", "etcdlite"))
    try:
        side = Side(alone.start().endpoint, dict(first.tokens))
        assert side.ask("", "kv/range", {"key": b64("a")})[0] == 400
        assert side.ask("root", "kv/range", {"key": b64("a")})[0] == 401, "of another cluster"
        assert side.ask("", "auth/authenticate", {"name": "root", "password": "root"})[0] == 200
        assert side.ask("root", "auth/user/get", {"name": "bob"})[1]["roles"] == ["green"]
    finally:
        alone.close()

    # The member that is left of a lost quorum goes on with them, and so do tokens.
    left = live.members["m1"]
    for member in live.running:
        member.kill()
    for flags in (["--force-new-cluster"], []):
        left.start(*flags)
        side = Side(left.endpoint, first.tokens)

        def is_alone(side: Side = side) -> bool:
            status, answer = side.ask("root", "cluster/member/list", {})
            return status == 200 and len(answer["members"]) == 1

        wait_until(is_alone, "it is a cluster of its own")
        assert side.ask("root", "auth/role/add", {"name": f"new {flags}"})[0] == 200
        assert side.ask("root", "kv/put", {"key": b64("a")})[0] == 200
        assert side.ask("ann", "kv/put", {"key": b64("a")})[0] == 403
        assert side.ask("", "kv/put", {"key": b64("a")})[0] == 400
        assert side.ask("", "auth/enable", {})[0] == 400
        if flags:
            left.wait_for_log("start it without --force-new-cluster")
        left.kill()


# The protocols.


def test_users_of_every_protocol(server: ServerFactory) -> None:
    """A token is a matter of the connection in the native protocol, and of the request elsewhere;
    health checks and metrics ask for none."""
    grpc = pytest.importorskip("grpc")  # Not later, while a token waits to be used.
    running = server("--auth-token-ttl=4")
    json_side = Side(running.endpoint)
    for path, body in BEGINNING:
        assert json_side.ask("", path, body)[0] == 200, path

    native, other = running.talk(), running.talk()
    put = proto.PutRequest(key=b"a")
    for connection in (native, other):
        connection.send(1, "KV.Put", put)
        assert connection.error()[1].message == "etcdserver: user name is empty"
    native.send(2, "Auth.Authenticate", proto.AuthenticateRequest(name="ann", password="ann"))
    token = proto.AuthenticateResponse.decode(native.receive()[3]).token
    native.send(3, "KV.Put", put)
    assert proto.PutResponse.decode(native.receive()[3]).header.revision == 2
    native.send(4, "KV.Put", proto.PutRequest(key=b"z"))
    assert native.error()[1].message == "etcdserver: permission denied"
    other.send(2, "KV.Put", put)
    assert other.error()[1].message == "etcdserver: user name is empty"
    other.send(3, "Auth.Authenticate", proto.AuthenticateRequest(password=token))
    assert proto.AuthenticateResponse.decode(other.receive()[3]).token == token
    other.send(4, "KV.Put", put)
    assert proto.PutResponse.decode(other.receive()[3]).header.revision == 3

    for header in ("Authorization", "Grpc-Metadata-Token"):
        url = f"http://{running.endpoint}/v3/kv/range"
        headers = {header: token, "Content-Type": "application/json"}
        body = json.dumps({"key": b64("a")}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
            assert json.load(response)["count"] == "1"

    with grpc.insecure_channel(running.endpoint) as channel:
        ranges = channel.unary_unary("/etcdserverpb.KV/Range")
        for name in ("token", "authorization"):
            ranges(proto.RangeRequest(key=b"a").encode(), metadata=[(name, token)])
            with pytest.raises(grpc.RpcError, match="permission denied"):
                ranges(proto.RangeRequest(key=b"z").encode(), metadata=[(name, token)])
            with pytest.raises(grpc.RpcError, match="invalid auth token"):
                ranges(proto.RangeRequest(key=b"a").encode(), metadata=[(name, "x")])
        with pytest.raises(grpc.RpcError, match="user name is empty"):
            ranges(proto.RangeRequest(key=b"a").encode())

    for path in ("health", "readyz", "livez", "metrics", "version"):
        with urllib.request.urlopen(f"http://{running.endpoint}/{path}") as response:
            assert response.status == 200, path

    def has_ended() -> bool:
        time.sleep(4.1)  # Each use extends it.
        native.send(5, "KV.Put", put)
        _, _, flags, body = native.receive()
        return bool(flags & 2) and "invalid auth token" in proto.Error.decode(body).message

    wait_until(has_ended, "the token ends")
    native.send(6, "Auth.Authenticate", proto.AuthenticateRequest(name="ann", password="ann"))
    assert proto.AuthenticateResponse.decode(native.receive()[3]).token != token
