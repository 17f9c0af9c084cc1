"""Mirrors and moves between clusters: etcdlite and the real etcd, both ways, while clients write.

The checker compares histories. The destination's history of a key must be the end of the source's:
nothing is missing, doubled or reordered within a key.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl_runner import Ended, run_ctl
from rigs.ports import free_ports
from rigs.processes import PATIENCE_S, ROOT, ServerFactory, ServerProcess, wait_until
from rigs.real_etcd import running_etcd, without_settings

from etcdlite import proto
from etcdlite.cli import mirror
from etcdlite.cli.session import Session
from etcdlite.client import (
    Client,
    ConnectionFailed,
    Delete,
    EtcdliteError,
    PermissionDenied,
    ProtocolViolation,
    Put,
    Timeout,
    UnknownOutcome,
)
from etcdlite.client.gateway import Gateway
from etcdlite.errors import RESOURCE_EXHAUSTED

Histories = dict[bytes, list[bytes | None]]

CHECKPOINT = b"mirror/position"
MIRROR = ("make-mirror", f"--checkpoint-key={CHECKPOINT.decode()}")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Gateway]:
    with running_etcd(tmp_path / "etcd") as endpoint:
        gateway = Gateway([endpoint], timeout_s=PATIENCE_S)
        yield gateway
        gateway.close()


def history(client: Any, last: int) -> Histories:
    """The changes of each key in order, up to revision `last`."""
    found: Histories = {}
    create = proto.WatchCreateRequest(key=b"\0", range_end=b"\0", start_revision=1)
    with client.stream("Watch.Watch", proto.WatchRequest(create_request=create)) as stream:
        for response in stream:
            assert not response.canceled, response.cancel_reason
            for event in response.events:
                if event.kv.mod_revision <= last:
                    value = None if event.type == 1 else event.kv.value
                    found.setdefault(event.kv.key, []).append(value)
            if response.events and response.events[-1].kv.mod_revision >= last:
                break
    found.pop(CHECKPOINT, None)
    return found


def revision(client: Any) -> int:
    header = client.call("KV.Range", proto.RangeRequest(key=b"x")).header
    found: int = header.revision
    return found


class Writer(threading.Thread):
    """Writes to a cluster until it is stopped: puts, deletes and transactions. Each value is
    written once."""

    def __init__(self, client: Any, first: int = 0, seed: int = 1) -> None:
        super().__init__(daemon=True)
        self.count = first
        self._client = client
        self._random = random.Random(seed)
        self._is_over = False
        self.start()

    def run(self) -> None:
        while not self._is_over:
            keys = self._random.sample(range(30), self._random.choice((1, 1, 1, 2, 10)))
            ops = []
            for key in keys:
                name = b"key/%d" % key
                self.count += 1
                if self._random.random() < 0.2:
                    delete = proto.DeleteRangeRequest(key=name)
                    ops.append(proto.RequestOp(request_delete_range=delete))
                else:
                    put = proto.PutRequest(key=name, value=b"%d" % self.count)
                    ops.append(proto.RequestOp(request_put=put))
            self._client.call("KV.Txn", proto.TxnRequest(success=ops))
            time.sleep(0.002)

    def stop(self) -> None:
        self._is_over = True
        self.join(PATIENCE_S)
        assert not self.is_alive()


class MirrorProcess:
    """A running `make-mirror`."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "etcdlite.ctl", *words],
            env={**without_settings(), "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_mirrored(self, source: Any, target: Any) -> None:
        """Wait for the revision that the source has now, and for a later one than the mirrors
        before this one have come to: so this one is at work."""
        begin = max(revision(source), mirrored_to(target) + 1)

        def has_caught_up() -> bool:
            self._check()
            return mirrored_to(target) >= begin

        wait_until(has_caught_up, "the mirror catches up")

    def _check(self) -> None:
        assert self._process.poll() is None, self._process.communicate()[1]

    def kill(self, signum: int = signal.SIGKILL) -> str:
        """End it. Returns what it wrote to stderr."""
        self._check()
        self._process.send_signal(signum)
        return self._process.communicate()[1]


def mirrored_to(client: Any) -> int:
    """The revision of the source that the checkpoint key has; 0 while keys are copied."""
    kvs = client.call("KV.Range", proto.RangeRequest(key=CHECKPOINT)).kvs
    position = json.loads(kvs[0].value) if kvs else {"after": ""}
    return 0 if "after" in position else int(position["revision"])


def check_end(whole: Histories, part: Histories) -> None:
    """Each history of `part` is the end of that of `whole`."""
    for key, changes in whole.items():
        shown = part.get(key, [])
        assert shown == changes[len(changes) - len(shown) :], f"the history of {key!r} differs"
        assert shown or changes[-1] is None, f"{key!r} is missing"
    assert part.keys() <= whole.keys()


def endpoint_of(client: Any) -> str:
    return str(client.endpoint)


@pytest.mark.parametrize("direction", ["from etcd", "to etcd"])
def test_a_move_under_load_loses_doubles_and_reorders_nothing(
    direction: str, etcd: Gateway, server: ServerFactory
) -> None:
    """The procedure of docs/moving.md, and the way back. The mirror is killed again and again,
    and so is the etcdlite."""
    lite = server(f"--listen-client-urls=http://127.0.0.1:{free_ports(1)[0]}")
    native = lite.client()
    source, target = (etcd, native) if direction == "from etcd" else (native, etcd)
    source.call("KV.Put", proto.PutRequest(key=b"first", value=b"1"))
    words = (f"--endpoints={endpoint_of(source)}", *MIRROR, endpoint_of(target))
    writes = Gateway([etcd.endpoint], timeout_s=PATIENCE_S) if source is etcd else lite.client()
    writer = Writer(writes)
    chance = random.Random(7)
    for turn in range(3):
        running = MirrorProcess(*words)
        running.wait_until_mirrored(source, target)
        time.sleep(chance.uniform(0.0, 0.2))
        if turn == 1 and target is native:
            lite.kill()
            lite.start()
            running.wait_until_mirrored(source, target)
        running.kill()
    running = MirrorProcess(*words)
    running.wait_until_mirrored(source, target)

    # The switch.
    writer.stop()
    began_s = time.monotonic()
    assert "mirrored " in running.kill(signal.SIGINT)
    ended = run_ctl(words[0], *MIRROR, "--once", "--verify", words[-1])
    pause_s = time.monotonic() - began_s
    assert ended.status == 0 and "verified: " in ended.stderr, ended
    assert f"the destination is at revision {revision(target)}" in ended.stderr
    print(f"{writer.count} changes; the writes paused for {pause_s:.2f} s")
    last, switched = revision(source), revision(target)
    whole, part = history(source, last), history(target, switched)
    check_end(whole, part)
    assert sum(map(len, part.values())) > 100

    # The way back: follow the new cluster from the switch on.
    back = "back/position"
    writes = lite.client() if target is native else Gateway([etcd.endpoint], timeout_s=PATIENCE_S)
    writer = Writer(writes, writer.count, 2)
    began = writer.count
    words = (
        f"--endpoints={endpoint_of(target)}", "make-mirror", f"--checkpoint-key={back}",
        "--prefix=key/", f"--rev={switched + 1}", endpoint_of(source),
    )  # fmt: skip
    running = MirrorProcess(*words)
    wait_until(
        lambda: source.call("KV.Range", proto.RangeRequest(key=back.encode())).kvs,
        "the mirror back begins",
    )
    wait_until(lambda: writer.count > began + 100, "there is something to mirror")
    running.kill()
    writer.stop()
    ended = run_ctl(*(word for word in words if "--rev" not in word), "--once", "--verify")
    assert ended.status == 0, ended
    assert "verified: " in ended.stderr
    now, after = history(target, revision(target)), history(source, revision(source))
    assert sum(map(len, now.values())) > sum(map(len, part.values())) + 20
    for key, changes in now.items():
        if key.startswith(b"key/"):
            new = changes[len(part.get(key, [])) :]
            assert after[key][len(whole.get(key, [])) :] == new, f"the way back of {key!r} differs"


def test_users_of_etcd_are_asked_for_their_passwords(etcd: Gateway, server: ServerFactory) -> None:
    lite = server()
    for name in ("root", "mirror"):
        etcd.call("Auth.UserAdd", proto.AuthUserAddRequest(name=name, password="secret"))
    etcd.call("Auth.RoleAdd", proto.AuthRoleAddRequest(name="root"))
    etcd.call("Auth.UserGrantRole", proto.AuthUserGrantRoleRequest(user="root", role="root"))
    etcd.call("Auth.AuthEnable", proto.AuthEnableRequest())
    lite.client().put("a", "1")
    words = (f"--endpoints={lite.endpoint}", "make-mirror", "--once", "--verify", etcd.endpoint)
    refusals = {
        "": "user name is empty",
        "root:wrong": "authentication failed, invalid user ID or password",
        "mirror:secret": "permission denied",
    }
    for user, why in refusals.items():
        ended = run_ctl(*words, f"--dest-user={user}")
        assert ended.status == 1 and why in ended.stderr, ended
    assert run_ctl(*words, "--dest-user=root:secret").status == 0
    words = (f"--endpoints={etcd.endpoint}", "make-mirror", "--once", "--prefix=a")
    ended = run_ctl(*words, "--user=root:secret", "--dest-prefix=b", lite.endpoint)
    assert ended.status == 0, ended
    assert lite.client().get("b").value == b"1"


def test_a_user_does_not_count_where_etcd_asks_for_none(
    etcd: Gateway, server: ServerFactory
) -> None:
    """A command line may name a user before authentication is enabled, as with etcdctl."""
    lite = server()
    lite.client().put("a", "1")
    words = ("make-mirror", "--once", etcd.endpoint, "--dest-user=root:secret")
    ended = run_ctl(f"--endpoints={lite.endpoint}", *words)
    assert ended.status == 0, ended
    assert etcd.call("KV.Range", proto.RangeRequest(key=b"a")).kvs[0].value == b"1"


# One mirror, on etcdlite alone.


@pytest.fixture
def pair(server: ServerFactory) -> tuple[ServerProcess, ServerProcess]:
    return server(), server()


def values(one: ServerProcess) -> dict[bytes, bytes]:
    return {kv.key: kv.value for kv in one.client().range(prefix=b"")}


def run_mirror(pair: tuple[ServerProcess, ServerProcess], *words: str) -> Ended:
    return run_ctl(f"--endpoints={pair[0].endpoint}", "make-mirror", *words, pair[1].endpoint)


def test_prefixes_are_chosen_and_replaced_as_in_etcdctl(
    pair: tuple[ServerProcess, ServerProcess],
) -> None:
    source = pair[0].client()
    for key in ("a/1", "a/a/2", "b/1"):
        source.put(key, key)
    assert run_mirror(pair, "--once", "--prefix=a/").status == 0
    assert values(pair[1]) == {b"a/1": b"a/1", b"a/a/2": b"a/a/2"}
    pair[1].client().delete(prefix=b"")
    assert run_mirror(pair, "--once", "--prefix=a/", "--dest-prefix=c/").status == 0
    assert values(pair[1]) == {b"c/1": b"a/1", b"c/a/2": b"a/a/2"}
    pair[1].client().delete(prefix=b"")
    ended = run_mirror(pair, "--once", "--prefix=a/", "--no-dest-prefix", "--verify")
    assert ended.status == 0 and "verified: 2 keys are equal" in ended.stderr
    assert values(pair[1]) == {b"1": b"a/1", b"a/2": b"a/a/2"}
    # A copy, and events of a revision with one key of the prefix.
    pair[1].client().delete(prefix=b"")
    source.txn([], [Put("a/3", "3"), Put("b/3", "3"), Delete("a/1")])
    assert run_mirror(pair, "--once", "--prefix=a/", "--rev=5").status == 0
    assert values(pair[1]) == {b"a/3": b"3"}
    pair[1].client().put("a/3", "other")
    ended = run_mirror(pair, "--once", "--prefix=a/", "--rev=6", "--verify")
    assert ended.status == 1
    assert "the destination differs from the source at a/3: the values differ" in ended.stderr


def test_a_large_revision_is_resumed_within(pair: tuple[ServerProcess, ServerProcess]) -> None:
    source, target = pair[0].client(), pair[1].client()
    source.txn([], [Put(f"k{n}", str(n)) for n in range(100)])
    words = ("--once", "--max-txn-ops=8", "--checkpoint-key=at", "--rev=2")
    assert run_mirror(pair, *words).status == 0
    steps = [
        (json.loads(kv.value)["revision"], json.loads(kv.value)["done"])
        for number in range(2, revision(target) + 1)
        for kv in [target.get("at", revision=number)]
        if kv is not None
    ]
    assert steps == [*((1, done) for done in range(7, 100, 7)), (2, 0)]
    # A mirror that was killed after the fourth transaction.
    was = target.get("at", revision=5)
    for n in range(28, 100):
        target.delete(f"k{n}")
    target.put("at", was.value)
    assert run_mirror(pair, *words[:3], "--verify").status == 0
    assert {key: value for key, value in values(pair[1]).items() if key != b"at"} == values(pair[0])
    assert target.get("k5").version == 1 and target.get("k27").version == 1


def test_what_cannot_go_on_says_why(pair: tuple[ServerProcess, ServerProcess]) -> None:
    source, target = pair[0].client(), pair[1].client()
    for n in range(5):
        source.put("a", str(n))
    refused = {
        ("--dest-prefix=b", "--no-dest-prefix"): "cannot be set at the same time",
        ("--max-txn-ops=0",): "must be at least 1",
        ("--max-txn-ops=1", "--checkpoint-key=at"): "must be at least 2",
        ("--verify",): "only for --once",
    }
    for words, why in refused.items():
        ended = run_mirror(pair, *words)
        assert (ended.status, why in ended.stderr) == (128, True), ended
    fields = '"version": 1, "source": "", "prefix": "", "destination": "", "done": 0, "revision": '
    values = ("x", "[]", '{"version": 2}', '{"version": 1, "revision": "x"}')
    for value in (*values, f"{{{fields}1e999}}", f"{{{fields}{1 << 64}}}"):
        target.put("at", value)
        ended = run_mirror(pair, "--once", "--checkpoint-key=at")
        assert ended.status == 1 and "not a mirror's position; name another" in ended.stderr
    target.delete("at")
    assert run_mirror(pair, "--once", "--checkpoint-key=at").status == 0
    ended = run_mirror(pair, "--once", "--checkpoint-key=at", "--prefix=a")
    assert ended.status == 1 and "of a mirror of another cluster or prefix" in ended.stderr
    ended = run_mirror(pair, "--once", "--checkpoint-key=at", "--rev=2")
    assert ended.status == 128 and "leave out --rev" in ended.stderr
    for n in range(5):
        source.put("a", str(n))
    source.compact(10)
    ended = run_mirror(pair, "--once", "--checkpoint-key=at")
    assert ended.status == 1 and "the mirror was stopped for too long" in ended.stderr
    ended = run_mirror(pair, "--once", "--rev=3")
    assert (
        ended.status == 1
        and "keys at the destination, and start again without --rev" in ended.stderr
        and "--rev 3 continues" not in ended.stderr
    )
    target.delete("at")
    assert run_mirror(pair, "--once", "--checkpoint-key=at").status == 0
    position = json.loads(target.get("at").value)
    target.put("at", json.dumps(position | {"revision": 9, "after": ""}))
    ended = run_mirror(pair, "--once", "--checkpoint-key=at")
    assert ended.status == 1 and "before all keys were copied" in ended.stderr
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    ended = run_ctl(f"--endpoints={pair[0].endpoint}", "make-mirror", "--once", nobody)
    assert ended.status == 1 and "connection refused" in ended.stderr


def test_a_mirror_does_not_feed_itself(pair: tuple[ServerProcess, ServerProcess]) -> None:
    client = pair[0].client()
    client.put("/a/x", "1")
    before = revision(client)
    own = (pair[0], pair[0])
    for words in ((), ("--prefix=/a/",), ("--prefix=/a/", "--dest-prefix=/a/b/")):
        ended = run_mirror(own, "--once", *words)
        assert ended.status == 128 and "copy its own changes for ever" in ended.stderr, ended
    assert revision(client) == before
    assert run_mirror(own, "--once", "--prefix=/a/", "--dest-prefix=/b/").status == 0
    assert client.get("/b/x").value == b"1"


class Wrapped:
    """A client of the destination. `before` runs before each transaction, `after` behind it."""

    def __init__(self, client: Client, before: Callable[[], None], after: Callable[[], None]):
        self._client = client
        self._before = before
        self._after = after

    def call(self, method: str, request: Any) -> Any:
        if method == "KV.Txn":
            self._before()
        response = self._client.call(method, request)
        if method == "KV.Txn":
            self._after()
        return response

    def close(self) -> None:
        self._client.close()


def run_wrapped(
    pair: tuple[ServerProcess, ServerProcess],
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], None],
    after: Callable[[], None],
    *flags: str,
) -> Ended:
    """Follow with a wrapped client of the destination."""
    client_of = mirror.client_of

    def wrapped(session: Session) -> Any:
        client = client_of(session)
        return (
            client if session.endpoints[0] == pair[0].endpoint else Wrapped(client, before, after)
        )

    monkeypatch.setattr(mirror, "client_of", wrapped)
    return run_mirror(pair, "--once", MIRROR[1], *(flags or ("--rev=2",)))


def nothing() -> None:
    pass


def test_two_mirrors_with_one_checkpoint_key_do_not_both_run(
    pair: tuple[ServerProcess, ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair[0].client(), pair[1].client()
    source.put("a", "1")

    def interfere() -> None:
        target.put(CHECKPOINT, "of another mirror")

    ended = run_wrapped(pair, monkeypatch, interfere, nothing)
    assert ended.status == 1 and "another mirror is running with it" in ended.stderr
    assert target.get("a") is None


@pytest.mark.parametrize("times", [1, 2])
def test_the_last_transaction_of_a_mirror_that_was_stopped_may_come_late(
    pair: tuple[ServerProcess, ServerProcess], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """It comes after the next mirror has read the checkpoint. A second one is another mirror's. The
    connection may break while the checkpoint is read again."""
    monkeypatch.setattr(mirror, "BACKOFF_FIRST_S", 0.001)
    source, target = pair[0].client(), pair[1].client()
    source.put("a", "1")
    assert run_mirror(pair, "--once", MIRROR[1]).status == 0
    for n in range(2, 5):
        source.put("a", str(n))
    late = [str(2 + n) for n in range(times)]

    def come_late() -> None:
        if late:
            kept = target.call("KV.Range", proto.RangeRequest(key=CHECKPOINT)).kvs[0]
            position = json.loads(kept.value)
            position["revision"] += 1
            changes = {b"a": late.pop(0).encode(), CHECKPOINT: json.dumps(position).encode()}
            ops = [mirror.change_op(key, value) for key, value in changes.items()]
            target.call("KV.Txn", proto.TxnRequest(success=ops))

    breaks = [False, True] if times == 1 else []
    call = Wrapped.call

    def fragile(self: Wrapped, method: str, request: Any) -> Any:
        is_again = method == "KV.Range" and request.key == CHECKPOINT and len(late) < times
        if is_again and breaks and breaks.pop(0):
            raise ConnectionFailed(text="the connection broke")
        return call(self, method, request)

    monkeypatch.setattr(Wrapped, "call", fragile)
    ended = run_wrapped(pair, monkeypatch, come_late, nothing, "--verify")
    assert not breaks
    if times == 1:
        assert ended.status == 0 and "verified: " in ended.stderr, ended
        assert history(target, revision(target))[b"a"] == [b"1", b"2", b"3", b"4"]
    else:
        assert ended.status == 1 and "another mirror is running with it" in ended.stderr


def test_the_first_transaction_of_a_mirror_that_was_stopped_may_come_late(
    pair: tuple[ServerProcess, ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair[0].client(), pair[1].client()
    source.put("a", "1")
    assert run_mirror(pair, "--once", MIRROR[1]).status == 0
    late = [target.call("KV.Range", proto.RangeRequest(key=CHECKPOINT)).kvs[0].value]
    assert target.delete(CHECKPOINT)
    source.put("a", "2")

    def come_late() -> None:
        if late:
            target.put(CHECKPOINT, late.pop())

    ended = run_wrapped(pair, monkeypatch, come_late, nothing, "--verify")
    assert ended.status == 0 and "verified: " in ended.stderr, ended
    assert history(target, revision(target))[b"a"] == [b"1", b"2"]


def test_a_transaction_whose_answer_is_lost_is_applied_once(
    pair: tuple[ServerProcess, ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair[0].client(), pair[1].client()
    for n in range(60):
        source.put(f"k{n % 7}", str(n))
    monkeypatch.setattr(mirror, "BACKOFF_MAX_S", 0.001)
    chance = random.Random(3)
    lost = []

    def lose(failure: EtcdliteError) -> None:
        if chance.random() < 0.4:
            lost.append(failure)
            raise failure

    ended = run_wrapped(
        pair,
        monkeypatch,
        lambda: lose(ConnectionFailed(text="not sent")),
        lambda: lose(UnknownOutcome(text="the answer is lost")),
    )
    assert ended.status == 0, ended
    assert {type(failure) for failure in lost} == {ConnectionFailed, UnknownOutcome}
    assert history(target, revision(target)) == history(source, revision(source))


def test_without_a_checkpoint_key_a_lost_answer_ends_the_mirror(
    pair: tuple[ServerProcess, ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair[0].client().put("a", "1")

    def lose() -> None:
        raise UnknownOutcome(text="the answer is lost")

    monkeypatch.setitem(globals(), "MIRROR", ("make-mirror", "--debug=false"))
    ended = run_wrapped(pair, monkeypatch, nothing, lose)
    assert ended.status == 1
    assert "mirrored 0 changes, up to revision 1 of the source" in ended.stderr
    assert "With --checkpoint-key a mirror goes on after this" in ended.stderr

    def refuse() -> None:
        raise PermissionDenied()

    ended = run_wrapped(pair, monkeypatch, refuse, nothing)
    assert ended.status == 1 and "permission denied" in ended.stderr
    assert "--checkpoint-key" not in ended.stderr, "with it, the mirror would end, too"


ANSWERS = [
    b"",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b'HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n{"etcdserver":"3.5.1"}',
    b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
]


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_a_server_that_answers_anything_gets_one_line(number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sock.recv(65536)
                    with sock, contextlib.suppress(OSError):
                        sock.sendall(ANSWERS[number])

        threading.Thread(target=serve, daemon=True).start()
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        ended = run_ctl(f"--endpoints={endpoint}", "make-mirror", "--once", "127.0.0.1:1")
    assert ended.status == 1
    assert ended.stderr.startswith("Error: ") and ended.stderr.count("\n") == 1, ended.stderr


def test_what_ends_the_stream_of_a_mirror_ends_its_feed_whatever_it_is() -> None:
    class Stream:
        def __iter__(self) -> Iterator[Any]:
            raise OSError("no descriptor is left")
            yield

        def cancel(self) -> None:
            pass

    feed = mirror._Feed(Stream())
    with pytest.raises(OSError, match="no descriptor is left"):
        feed.take(PATIENCE_S)
    feed.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", Timeout),
        (b"HTTP/1.1 200 OK\r\n", Timeout),
        (b"HTTP/1.1 500 E\r\nContent-Length: 50\r\n\r\n{", Timeout),
        (b"HTTP/1.1 500 E\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ConnectionFailed),
        (b"HTTP/1.1 500 E\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", ConnectionFailed),
        (b"HTTP/1.1 500 E\r\nContent-Length: 2\r\n\r\n[]", ProtocolViolation),
    ],
)
def test_a_gateway_that_stalls_or_breaks_off_ends_a_call_and_a_stream(
    answer: bytes, error: type[EtcdliteError]
) -> None:
    held = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    held[-1].recv(65536)
                    held[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        gateway = Gateway([f"127.0.0.1:{listener.getsockname()[1]}"], timeout_s=0.2)
        asks = (
            lambda: gateway.call("KV.Range", proto.RangeRequest(key=b"k")),
            lambda: gateway.stream("Watch.Watch", proto.WatchRequest()),
        )
        for ask in asks:
            with pytest.raises(error) as caught:
                ask()
            assert caught.value.text.startswith(f"{gateway.endpoint}: ")
        gateway.close()
        for sock in held:
            sock.close()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_gateway_that_sends_byte_by_byte_does_not_make_a_call_outlive_its_timeout(
    head: bytes,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                sock.recv(65536)
                sock.sendall(head)
                for _ in range(200):  # For 4 s; then it ends before the answer does.
                    time.sleep(0.02)
                    sock.sendall(b" ")

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=trickle, args=(sock,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        gateway = Gateway([f"127.0.0.1:{listener.getsockname()[1]}"], timeout_s=0.3)
        for ask in (
            lambda: gateway.call("KV.Range", proto.RangeRequest(key=b"k")),
            lambda: gateway.call("KV.Put", proto.PutRequest(key=b"k")),
        ):
            with pytest.raises(Timeout, match=r"no answer in 0\.3 s"):
                ask()
        if b"\r\n\r\n" not in head:
            with pytest.raises(Timeout, match=r"no answer in 0\.3 s"):
                gateway.stream("Watch.Watch", proto.WatchRequest())
        gateway.close()


def test_an_answer_that_is_cut_off_is_not_called_too_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with sock:
                        sock.recv(65536)
                        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}")

        threading.Thread(target=serve, daemon=True).start()
        gateway = Gateway([f"127.0.0.1:{listener.getsockname()[1]}"])
        with pytest.raises(ConnectionFailed, match="cut off"):
            gateway.version()
        gateway.close()


def test_a_gateway_logs_in_again_when_users_change(tmp_path: Path) -> None:
    """A JSON Web Token is not valid any more once users or roles have changed."""
    secret = tmp_path / "secret"
    secret.write_text("secret" * 10)
    token = f"--auth-token=jwt,sign-method=HS256,priv-key={secret}"
    with running_etcd(tmp_path / "etcd", flags=[token]) as endpoint:
        root = Gateway([endpoint], user="root", password="root", timeout_s=PATIENCE_S)
        put = proto.PutRequest(key=b"a", value=b"b")
        assert root.call("KV.Put", put).header.revision == 2, "the user does not count yet"
        for method, request in (
            ("Auth.UserAdd", proto.AuthUserAddRequest(name="root", password="root")),
            ("Auth.RoleAdd", proto.AuthRoleAddRequest(name="root")),
            ("Auth.UserGrantRole", proto.AuthUserGrantRoleRequest(user="root", role="root")),
            ("Auth.AuthEnable", proto.AuthEnableRequest()),
        ):
            root.call(method, request)
        assert root.call("KV.Put", put).header.revision == 3
        other = Gateway([endpoint], user="root", password="root", timeout_s=PATIENCE_S)
        other.call("Auth.RoleAdd", proto.AuthRoleAddRequest(name="r"))
        watch = proto.WatchRequest(create_request=proto.WatchCreateRequest(key=b"a"))
        with root.stream("Watch.Watch", watch) as stream:
            assert not next(iter(stream)).canceled
        other.call("Auth.RoleAdd", proto.AuthRoleAddRequest(name="s"))
        assert root.call("KV.Put", put).header.revision == 4
        for gateway in (root, other):
            gateway.close()


def test_a_gateway_names_the_endpoint_that_failed() -> None:
    """The last one that it tried, and not the one that it would try next."""
    endpoints = [f"127.0.0.1:{port}" for port in free_ports(3)]
    gateway = Gateway(endpoints)
    asks = (gateway.version, lambda: gateway.stream("Watch.Watch", proto.WatchRequest()))
    for ask in asks:
        with pytest.raises(ConnectionFailed, match="connection refused") as caught:
            ask()
        assert caught.value.endpoint == endpoints[2]
        assert caught.value.text.startswith(f"{endpoints[2]}: ")
    gateway.close()


def test_pages_are_smaller_where_values_are_large() -> None:
    class Source:
        def call(self, method: str, request: proto.RangeRequest) -> proto.RangeResponse:
            first = 0 if request.key == b"k" else int(request.key[1:4]) + 1
            if request.limit > 3:
                raise EtcdliteError(RESOURCE_EXHAUSTED, "the answer is too large")
            kvs = [proto.KeyValue(key=b"k%03d" % n) for n in range(first, 9)]
            more = len(kvs) > request.limit
            return proto.RangeResponse(
                header=proto.ResponseHeader(revision=7), kvs=kvs[: request.limit], more=more
            )

    found = [kv.key for kv in mirror.pages(Source(), b"k", 0)]
    assert found == [b"k%03d" % n for n in range(9)]
