"""The HTTP side, in process with a lone member, over sockets with curl, and beside a real etcd."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import queue
import random
import re
import selectors
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.lone_member import LoneMember
from rigs.plain_json import plain_json
from rigs.processes import PATIENCE_S
from rigs.real_etcd import running_etcd
from rigs.wire import take_output

from etcdlite import __version__, json_mapping, methods, proto
from etcdlite.errors import EtcdError, error
from etcdlite.limits import DEFAULT_LIMITS
from etcdlite.member import Member
from etcdlite.proto import MAX_FIELDS
from etcdlite.raft import LEADER
from etcdlite.request import Waiter
from etcdlite.session import MIN_RECEIVED_BYTES_PER_S
from etcdlite.versions import CURRENT
from etcdlite.wire import gateway
from etcdlite.wire.calls import MAX_UNANSWERED
from etcdlite.wire.http import (
    BODY_TIMEOUT_S,
    HEAD_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    INLINE_BYTES,
    LINGER_S,
    MAX_HEAD_BYTES,
    MAX_HEAD_LINES,
    MAX_UNREAD_BYTES,
    MAX_WAITING_BYTES,
    PIECE_BYTES,
    HttpSession,
)
from etcdlite.wire.session import INVALID_TOKEN
from etcdlite.wire.site import Site

FOO = base64.b64encode(b"foo").decode()
BAR = base64.b64encode(b"bar").decode()
HIGH_WATER_BYTES = DEFAULT_LIMITS.high_water_bytes
EVERYTHING = {"key": "AA==", "range_end": "AA=="}

_NUMBERS = {name: method.number for name, method in methods.METHOD_BY_NAME.items()}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]


class Browser:
    """One connection to a lone member, with the bytes in the test's hands."""

    def __init__(self, lone: LoneMember, site: Site | None = None, is_local: bool = False) -> None:
        self.lone = lone
        site = site or Site(lone.member)
        self.session = HttpSession(lone.member, lambda session: None, site, is_local)
        self.received = b""

    def send(self, data: bytes) -> None:
        """Give the session what a client sent, as the server would, and let all be done."""
        for at in range(0, len(data), 65536):
            self.session.receive(data[at : at + 65536])
            self.settle()

    def settle(self) -> None:
        session = self.session
        while True:
            self.lone.settle()
            self.flush()
            if not session.has_more:
                return
            session.produce()

    def flush(self) -> None:
        """Take what is to be sent."""
        self.received += take_output(self.session)

    def answers(self, *verbs: str) -> list[Answer]:
        """What was received since the last call, as answers to requests with these verbs."""
        conn = h11.Connection(h11.CLIENT)
        conn.receive_data(self.received)
        self.received = b""
        found: list[Answer] = []
        for verb in verbs or ("POST",) * 1000:
            conn.send(h11.Request(method=verb, target="/", headers=[("Host", "x")]))
            conn.send(h11.EndOfMessage())
            head: Any = None
            body = b""
            while True:
                event = conn.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                if isinstance(event, h11.Response):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    break
            if head is None:
                return found
            headers = {name.decode(): value.decode() for name, value in head.headers}
            is_whole = isinstance(event, h11.EndOfMessage)
            found.append(Answer(head.status_code, headers, body, is_whole))
            if not is_whole or conn.our_state is not h11.DONE or conn.their_state is not h11.DONE:
                return found
            conn.start_next_cycle()
        return found

    def ask(
        self, verb: str, path: str, body: Any = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """One request and its answer."""
        self.send(request(verb, path, body, headers))
        found = self.answers(verb)
        assert len(found) == 1, found
        return found[0]

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any = b"{}", **headers: str) -> Answer:
        return self.ask("POST", path, body, headers)

    def put(self, key: bytes, value: bytes) -> None:
        encoded = {"key": b64(key), "value": b64(value)}
        assert self.post("/v3/kv/put", encoded).status == 200


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def request(verb: str, path: str, body: Any = b"", headers: dict[str, str] | None = None) -> bytes:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    lines = [f"{verb} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in (headers or {}).items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture
def lone(lone: LoneMember) -> LoneMember:
    lone.elect()
    return lone


@pytest.fixture
def browser(lone: LoneMember) -> Browser:
    return Browser(lone)


def raise_alarm(lone: LoneMember, kind: int) -> None:
    request = proto.AlarmRequest(action=1, memberID=7, alarm=kind)
    lone.member.writes.propose_message(Waiter(None, 0, _NUMBERS["Maintenance.Alarm"], request))
    lone.settle()


def lose_the_leader(lone: LoneMember) -> None:
    lone.member.raft.leader = 0
    lone.member.raft.role = 0


# Health, version, metrics.


def test_a_healthy_member_says_so(browser: Browser) -> None:
    answer = browser.get("/health")
    assert answer.status == 200
    assert answer.body == b'{"health":"true","reason":""}'
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert browser.session.site.health_successes == 1


def test_an_alarm_makes_a_member_unhealthy_unless_it_is_excluded(
    lone: LoneMember, browser: Browser
) -> None:
    raise_alarm(lone, 1)
    answer = browser.get("/health")
    assert answer.status == 503
    assert answer.body == b'{"health":"false","reason":"ALARM NOSPACE"}\n'
    assert browser.session.site.health_failures == 1
    assert browser.get("/health?exclude=NOSPACE").status == 200
    assert browser.get("/health?exclude=CORRUPT&exclude=NOSPACE").status == 200
    assert browser.get("/health?exclude=").status == 503
    raise_alarm(lone, 2)
    assert browser.get("/health?exclude=NOSPACE").json["reason"] == "ALARM CORRUPT"
    assert browser.get("/health?exclude=NOSPACE&exclude=CORRUPT").status == 200


def test_damaged_data_makes_a_member_unhealthy_unless_it_is_excluded(
    lone: LoneMember, browser: Browser
) -> None:
    lone.member.state.store.data.damaged.add(1)
    for path in ("/health", "/health?serializable=true"):
        assert browser.get(path).json == {"health": "false", "reason": "DATA DAMAGED"}
    assert browser.get("/health?exclude=DAMAGED").status == 200
    assert b"[-]data_corruption failed: the disk has damaged data" in browser.get("/readyz").body


def test_status_says_since_when_there_is_no_leader(lone: LoneMember, browser: Browser) -> None:
    lose_the_leader(lone)
    lone.now += 14.0
    errors = browser.post("/v3/maintenance/status").json["errors"]
    assert errors == [
        "etcdserver: no leader",
        "etcdlite: no leader since 14 s; 1 of 1 voting members reachable",
    ]


def test_the_page_learns_which_members_are_connected(lone: LoneMember, browser: Browser) -> None:
    other = proto.Member(ID=0xAB, peerURLs=["http://127.0.0.1:1"])
    lone.member.peers.update({7: proto.Member(ID=7), 0xAB: other})
    assert browser.get("/debug/vars").json["connected"] == {"ab": False}


def test_without_a_leader_a_member_is_healthy_only_for_itself(
    lone: LoneMember, browser: Browser
) -> None:
    lose_the_leader(lone)
    assert browser.get("/health").json == {"health": "false", "reason": "RAFT NO LEADER"}
    assert browser.get("/health?serializable=true").status == 200
    assert browser.get("/livez").body == b"ok\n"
    answer = browser.get("/readyz")
    assert answer.status == 503
    assert answer.body.decode() == (
        "[+]data_corruption ok\n[+]serializable_read ok\n"
        "[-]linearizable_read failed: etcdserver: no leader\n[+]non_learner ok\n\n"
    )
    assert browser.get("/readyz?exclude=linearizable_read").body == b"ok\n"


def test_the_checks_can_be_listed_left_out_and_run_alone(browser: Browser) -> None:
    assert browser.get("/livez?verbose").body == b"[+]serializable_read ok\nok\n"
    everything = browser.get("/readyz?verbose").body.decode()
    assert everything == (
        "[+]data_corruption ok\n[+]serializable_read ok\n"
        "[+]linearizable_read ok\n[+]non_learner ok\nok\n"
    )
    assert browser.get("/readyz").body == b"ok\n"
    assert browser.get("/readyz?verbose&exclude=non_learner").body.count(b"\n") == 4
    assert browser.get("/readyz?exclude=no_such_check").body == b"ok\n"
    for path in ("/livez/serializable_read", "/readyz/data_corruption", "/readyz/non_learner"):
        assert browser.get(path).body == b"ok\n", path
    assert browser.get("/readyz/linearizable_read?verbose").body == b"[+]linearizable_read ok\nok\n"
    for path in ("/livez/linearizable_read", "/readyz/nothing", "/readyz/", "/livez/a/b"):
        assert browser.get(path).status == 404, path
    assert browser.session.site.checks["readyz", "data_corruption", "success"] > 1


def test_damage_makes_a_member_unready_but_not_dead(lone: LoneMember, browser: Browser) -> None:
    raise_alarm(lone, 2)
    assert browser.get("/livez").status == 200
    answer = browser.get("/readyz")
    assert answer.status == 503
    assert b"[-]data_corruption failed: alarm activated: CORRUPT\n" in answer.body
    assert browser.get("/readyz/data_corruption").status == 503
    assert browser.get("/readyz?exclude=data_corruption").status == 200
    assert not browser.session.site.last_checks["readyz", "data_corruption"]


def test_a_probe_that_nobody_answers_fails_after_the_request_timeout(
    lone: LoneMember, browser: Browser
) -> None:
    browser.session.receive(request("GET", "/readyz"))
    lone.member.reads.new.clear()
    lone.member.reads.ready.clear()  # Lost, as by a leader that is cut off.
    assert not browser.session.outbox.parts
    browser.session._request.deadline = lone.now + 7  # type: ignore[union-attr]
    browser.session.tick(lone.now + 6.9)
    assert not browser.session.outbox.parts
    browser.session.tick(lone.now + 7.1)
    browser.settle()
    (answer,) = browser.answers("GET")
    assert b"[-]serializable_read failed: etcdserver: request timed out\n" in answer.body
    assert b"[+]linearizable_read ok\n" in answer.body


def test_clients_meet_the_etcd_version_and_see_ours(browser: Browser) -> None:
    version = browser.get("/version").json
    assert version["etcdserver"] == version["etcdcluster"] == "3.6.0"
    assert version["etcdlite"]


def test_metrics_are_what_the_function_gives(lone: LoneMember) -> None:
    browser = Browser(lone, Site(lone.member, metrics=lambda: b"etcdlite_up 1\n"))
    answer = browser.get("/metrics")
    assert answer.body == b"etcdlite_up 1\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert Browser(lone).get("/metrics").status == 404


def test_a_metrics_listener_serves_health_and_metrics_only(lone: LoneMember) -> None:
    browser = Browser(lone, Site(lone.member, metrics=lambda: b"", only_metrics=True))
    for path in ("/metrics", "/health", "/livez", "/readyz"):
        assert browser.get(path).status == 200, path
    for path in ("/", "/version", "/debug/vars"):
        assert browser.get(path).status == 404, path
    assert browser.post("/v3/kv/range", {"key": FOO}).status == 404
    assert browser.post("/v3/watch", {"create_request": {"key": FOO}}).status == 404


def test_the_inner_state_has_no_keys_in_it(browser: Browser) -> None:
    browser.put(b"secret-key", b"secret-value")
    answer = browser.get("/debug/vars")
    assert answer.json["raft.status"]["raftState"] == "StateLeader"
    assert answer.json["store"]["keys"] == 1
    assert b"secret" not in answer.body


def test_head_is_get_without_the_body(browser: Browser) -> None:
    for path in ("/", "/health", "/version", "/readyz"):
        whole, head = browser.get(path), browser.ask("HEAD", path)
        assert (head.status, head.body) == (200, b""), path
        assert head.headers == whole.headers, path
    assert browser.ask("HEAD", "/v3/kv/range").status == 405


def test_other_verbs_are_not_allowed(browser: Browser) -> None:
    for path in ("/health", "/readyz", "/version", "/"):
        answer = browser.post(path)
        assert (answer.status, answer.headers["allow"]) == (405, "GET"), path
    for verb in ("GET", "PUT", "DELETE", "PATCH"):
        answer = browser.ask(verb, "/v3/kv/range", b"")
        assert (answer.status, answer.headers["allow"]) == (405, "POST"), verb
    assert browser.ask("OPTIONS", "/v3/kv/range").status == 200
    assert browser.ask("OPTIONS", "*").status == 200


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/health", "/debug/vars", "/v3/kv/range", "localhost:80"]
)
def test_there_is_no_tunnel(lone: LoneMember, path: str) -> None:
    browser = Browser(lone, Site(lone.member, metrics=lambda: b"etcdlite_up 1\n"))
    browser.send(f"CONNECT {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert browser.received.startswith(b"HTTP/1.1 405 ")
    assert browser.session._discards, "what follows is not a request"


# The gateway.


def test_a_key_can_be_written_and_read(browser: Browser) -> None:
    answer = browser.post("/v3/kv/put", {"key": FOO, "value": BAR})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["header"] == {
        "cluster_id": "8", "member_id": "7", "revision": "2", "raft_term": "1",
    }  # fmt: skip
    body = browser.post("/v3/kv/range", {"key": FOO}).body.decode()
    assert body.endswith(
        f'"kvs":[{{"key":"{FOO}","create_revision":"2","mod_revision":"2","version":"1",'
        f'"value":"{BAR}"}}],"count":"1"}}'
    ), body


def test_the_old_prefixes_work(browser: Browser) -> None:
    for prefix in ("/v3", "/v3beta", "/v3alpha"):
        assert browser.post(f"{prefix}/kv/range", {"key": FOO}).status == 200


def test_every_method_with_a_path_is_there(browser: Browser) -> None:
    for path in gateway.METHODS:
        answer = Browser(browser.lone).ask("GET", path)
        assert answer.status == 405, path
    assert len(gateway.METHODS) > 3 * 45


def test_a_downgrade_is_checked(browser: Browser) -> None:
    answer = browser.post("/v3/maintenance/downgrade", {"action": "VALIDATE", "version": "3.5"})
    assert (answer.status, answer.json["code"]) == (400, 3)
    assert answer.json["message"] == "etcdserver: invalid downgrade target version"
    answer = browser.post("/v3/maintenance/downgrade", {"action": "VALIDATE", "version": "0.1"})
    assert answer.json["version"] == "0.2"


def test_the_versions_of_program_cluster_and_data_are_shown(browser: Browser) -> None:
    assert browser.get("/version").json == {
        "etcdserver": "3.6.0",
        "etcdcluster": "3.6.0",
        "storage": CURRENT.full,
        "etcdlite": __version__,
        "etcdlitecluster": CURRENT.full,
    }


def test_unknown_paths_are_not_found(browser: Browser) -> None:
    answer = browser.post("/v3/no/such")
    assert (answer.status, answer.json["code"], answer.json["message"]) == (404, 5, "Not Found")
    for path in ("/nothing", "/v4/kv/range", "/v3", "/favicon.ico"):
        assert browser.get(path).status == 404, path


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page.html",
        "/../page.html",
        "/v3/../page.html",
        "/.",
        "/\\..\\..",
        "file:///etc/passwd",
        "/%00",
        "/debug/vars/../../page.html",
    ],
)
def test_no_path_leads_to_a_file(browser: Browser, path: str) -> None:
    answer = browser.get(path)
    assert answer.status == 404
    assert b"root:" not in answer.body and b"<html" not in answer.body


def test_a_whole_url_is_understood_as_its_path(browser: Browser) -> None:
    assert browser.get("http://localhost:2379/health?serializable=true").status == 200
    assert browser.get("http://localhost").status == 200


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"key":"Zm9v"', "unexpected EOF"),
        (b'{"key":"Zm9', "unexpected EOF"),
        (b"{", "unexpected EOF"),
        (b"hello", "Expecting value"),
        (b"[]", "not a JSON object"),
        (b"5", "not a JSON object"),
        (b'{"key":5}', "RangeRequest.key"),
        (b'{"key":"!!"}', "not base64"),
        (b'{"key":"Zm9v","limit":"x"}', "RangeRequest.limit"),
        (b'{"key":"Zm9v","limit":1.5}', "RangeRequest.limit"),
        (b'{"key":"Zm9v","limit":99999999999999999999}', "RangeRequest.limit"),
        (b'{"key":"Zm9v","limit":NaN}', "NaN"),
        (b'{"key":"Zm9v","sort_order":"SIDEWAYS"}', "RangeRequest.sort_order"),
        (b'{"limit":' + b"9" * 100_000 + b"}", "digits"),
        (b"[" * 1_000_000, "JSON values"),
        (b'{"a":' * 5_000, "nested"),
        (b'{"a":' * 501 + b"1" + b"}" * 501, "nested"),
        (b'{"a":"\\\\","b":' + b"[" * 500 + b'"]"' + b"]" * 500 + b"}", "nested"),
        (b'{"key":"' + b"\\u00" * 10, "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
    ],
)
def test_bad_json_is_a_bad_request(browser: Browser, body: bytes, text: str) -> None:
    answer = browser.post("/v3/kv/range", body)
    assert answer.status == 400, answer
    assert answer.json["code"] == 3
    assert answer.json["error"] == answer.json["message"]
    assert text in answer.json["message"]
    assert browser.get("/version").status == 200


def test_what_etcd_lets_pass_passes(browser: Browser) -> None:
    browser.put(b"foo", b"bar")
    for body in (
        b' \n{"key":"Zm9v"} trailing',
        b'{"key":"Zm9v"}{"key":"YQ=="}',
        b'{"key":"YQ==","key":"Zm9v"}',
        b'{"key":"Zm9v","no_such_field":{"x":[1]}}',
        b'{"key":"Zm9v","no_such_field":' + b"[" * 499 + b"]" * 499 + b"}",
        b'{"key":"Zm9v","no_such_field":"' + b'[\\"' * 600 + b'"}',
        b'{"key":"Zm9v","limit":null,"range_end":null}',
        b'{"key":"Zm9v","limit":"5","keysOnly":true}',
        b'{"key":"Zm9v","sort_order":1}',
    ):
        answer = browser.post("/v3/kv/range", body)
        assert (answer.status, answer.json.get("count")) == (200, "1"), body
    for body in (b"", b"null", b"{}", b" "):
        answer = browser.post("/v3/kv/range", body)
        assert (answer.status, answer.json["message"]) == (
            400,
            "etcdserver: key is not provided",
        ), body


def test_errors_have_the_status_that_grpc_gateway_gives_them(browser: Browser) -> None:
    put = {"key": FOO, "value": BAR}
    assert browser.post("/v3/kv/put", {**put, "lease": "77"}).status == 404
    assert browser.post("/v3/kv/range", {"key": FOO, "revision": 99}).status == 400
    assert browser.post("/v3/lease/grant", {"TTL": 60, "ID": 5}).status == 200
    answer = browser.post("/v3/lease/grant", {"TTL": 60, "ID": 5})
    assert (answer.status, answer.json["code"]) == (400, 9)
    assert browser.post("/v3/lease/grant", {"TTL": 10**18}).status == 400


def test_a_request_that_is_too_large_for_the_log_is_refused_and_the_connection_kept(
    tmp_path: Path,
) -> None:
    lone = LoneMember(tmp_path / "m", max_request_bytes=10_000)
    lone.elect()
    browser = Browser(lone)
    answer = browser.post("/v3/kv/put", {"key": FOO, "value": b64(b"x" * 10_000)})
    assert (answer.status, answer.json["message"]) == (400, "etcdserver: request is too large")
    assert browser.post("/v3/kv/put", {"key": FOO, "value": b64(b"x" * 9_900)}).status == 200
    lone.close()


def test_a_transaction_as_the_documentation_writes_it(browser: Browser) -> None:
    browser.put(b"foo", b"bar")
    answer = browser.post(
        "/v3/kv/txn",
        {
            "compare": [{"target": "CREATE", "key": FOO, "createRevision": "2"}],
            "success": [{"requestPut": {"key": FOO, "value": BAR}}],
        },
    )
    assert answer.body.endswith(
        b'"succeeded":true,"responses":[{"response_put":{"header":{"revision":"3"}}}]}'
    ), answer.body


def test_more_values_than_a_transaction_may_have_are_refused_before_they_are_built(
    browser: Browser,
) -> None:
    answer = browser.post("/v3/kv/txn", b'{"compare":[' + b"{}," * 500_000 + b"{}]}")
    assert answer.status == 400
    assert "JSON values" in answer.json["message"]
    most = {"compare": [{"key": FOO, "target": "VERSION", "version": "0"}] * 128}
    most["success"] = [{"request_put": {"key": b64(b"%d" % n), "value": BAR}} for n in range(128)]
    assert browser.post("/v3/kv/txn", most).status == 200


def test_a_message_of_a_stream_with_more_fields_than_it_may_have_ends_the_stream(
    browser: Browser,
) -> None:
    """JSON may have more values than a message fields; the streams decode what JSON became."""
    filters = [0] * (MAX_FIELDS + 1)
    answer = browser.post("/v3/watch", {"create_request": {"key": FOO, "filters": filters}})
    assert answer.status == 400
    assert "fields" in answer.json["message"]


@pytest.mark.parametrize("path", ["timetolive", "keepalive"])
@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (b"\x0a\x02\x18\x09\x10\x07\x98\x06\x01", '"ID":"7"'),  # A field that a newer version has.
        (b"\x0a\x05", "cannot be read"),
        (b"\xff" * 12, "cannot be read"),
    ],
)
def test_an_answer_of_the_leader_that_this_version_would_not_write_costs_its_request_at_most(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, path: str, answer: bytes, shown: str
) -> None:
    member = browser.lone.member
    monkeypatch.setattr(member.state.lessor, "promoted", False)
    monkeypatch.setattr(member.questions, "ask", lambda method, body, done: done(answer))
    browser.send(request("POST", f"/v3/lease/{path}", {"ID": "7"}))
    assert shown.encode() in browser.received, browser.received


def test_a_large_answer_of_the_leader_that_is_none_ends_its_connection(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = browser.lone.member
    answer = proto.LeaseTimeToLiveResponse(ID=7, keys=[bytes(100)] * 1000).encode()
    monkeypatch.setattr(member.state.lessor, "promoted", False)
    monkeypatch.setattr(member.questions, "ask", lambda method, body, done: done(answer[:-1]))
    browser.send(request("POST", "/v3/lease/timetolive", {"ID": "7"}))
    assert browser.session.is_aborted
    assert "cannot be read" in browser.session.why_aborted


def test_a_large_range_is_answered_in_slices(browser: Browser) -> None:
    value = b"v" * 1000
    for number in range(300):
        browser.put(b"key-%04d" % number, value)
    browser.session.receive(request("POST", "/v3/kv/range", EVERYTHING))
    browser.lone.settle()
    sizes = []
    while browser.session.has_more:
        browser.session.produce()
        sizes.append(sum(map(len, browser.session.outbox.parts)))
        browser.flush()
    assert len(sizes) > 2, sizes
    assert max(sizes) < 8 * INLINE_BYTES
    (answer,) = browser.answers("POST")
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.json["count"] == "300"
    assert [kv["value"] for kv in answer.json["kvs"]] == [b64(value)] * 300


def test_a_client_that_does_not_read_holds_a_bounded_answer(browser: Browser) -> None:
    for number in range(40):
        browser.put(b"key-%04d" % number, b"v" * 100_000)
    session = browser.session
    session.receive(request("POST", "/v3/kv/range", EVERYTHING))
    while True:
        browser.lone.settle()
        if not session.has_more:
            break
        session.produce()
    assert HIGH_WATER_BYTES < session.outbox.unsent_bytes < 2 * HIGH_WATER_BYTES
    assert session.is_blocked and not session.is_idle
    browser.settle()
    (answer,) = browser.answers("POST")
    assert len(answer.json["kvs"]) == 40
    assert session.is_idle


def test_grpc_timeout_is_kept_and_answered_once(lone: LoneMember, browser: Browser) -> None:
    session = browser.session
    session.receive(request("POST", "/v3/kv/range", {"key": FOO}, {"Grpc-Timeout": "50m"}))
    session.tick(lone.now + 0.04)
    assert not session.outbox.parts
    session.tick(lone.now + 0.06)
    browser.settle()
    (answer,) = browser.answers("POST")
    assert answer.status == 504
    assert answer.json["message"] == "context deadline exceeded"
    for timeout in ({}, {"Grpc_Timeout": "0S"}):  # 0 is no timeout, as in etcd's gateway.
        assert browser.post("/v3/kv/range", {"key": FOO}, **timeout).status == 200
    answer = browser.post("/v3/kv/range", {"key": FOO}, Grpc_Timeout="soon")
    assert (answer.status, answer.json["message"]) == (400, "invalid grpc-timeout: soon")


def test_metadata_comes_in_headers(lone: LoneMember, browser: Browser) -> None:
    session = browser.session
    header = {"Authorization": "token-1", "Grpc-Metadata-Token": "token-2"}
    session.receive(request("POST", "/v3/kv/range", {"key": FOO}, header))
    assert session.token(session._next_id) == "token-2"
    assert session.token(session._next_id + 1) == ""
    browser.settle()
    assert session.token(session._next_id) == ""
    browser.answers("POST")
    session.receive(request("POST", "/v3/kv/range", {"key": FOO}, {"Authorization": "token-1"}))
    assert session.token(session._next_id) == "token-1"
    browser.settle()
    browser.answers("POST")
    first = request("POST", "/v3/kv/range", {"key": FOO}, {"Grpc-Metadata-Token": "token-1"})
    session.receive(first.replace(b"\r\n\r\n", b"\r\nGrpc-Metadata-Token: token-2\r\n\r\n", 1))
    assert session.token(session._next_id) == "token-1"  # As in etcd.
    browser.settle()
    browser.answers("POST")
    header = {"Authorization": "token-1", "Grpc-Metadata-Token": ""}
    session.receive(request("POST", "/v3/kv/range", {"key": FOO}, header))
    assert session.token(session._next_id) == INVALID_TOKEN  # As in etcd.
    browser.settle()
    browser.answers("POST")
    lose_the_leader(lone)
    body = {"key": FOO, "serializable": True}
    assert browser.post("/v3/kv/range", body).status == 200
    answer = browser.post("/v3/kv/range", body, Grpc_Metadata_hasleader="true")
    assert (answer.status, answer.json["message"]) == (503, "etcdserver: no leader")


# Streams.


def test_a_watch_sends_a_line_for_each_response(lone: LoneMember, browser: Browser) -> None:
    browser.put(b"foo", b"one")
    browser.send(
        request("POST", "/v3/watch", {"create_request": {"key": FOO, "start_revision": "2"}})
    )
    Browser(lone).put(b"foo", b"two")
    browser.settle()
    (answer,) = browser.answers("POST")
    assert (answer.status, answer.is_whole) == (200, False)
    assert answer.headers["transfer-encoding"] == "chunked"
    created, *events = answer.lines
    assert created["result"]["created"] is True
    values = [event["kv"]["value"] for line in events for event in line["result"]["events"]]
    assert values == [b64(b"one"), b64(b"two")]
    assert browser.session.is_idle


def test_a_stream_of_requests_may_come_in_any_pieces(browser: Browser) -> None:
    body = (
        b'{"create_request":{"key":"Zm9v"}}\n'
        b'{"create_request":{"key":"YQ==","watch_id":"7"}}'
        b' {"cancel_request":{"watch_id":"7"}}{"progress_request":{}}'
    )
    head = request("POST", "/v3/watch", headers={"Transfer-Encoding": "chunked"})
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    for byte in head + chunks:
        browser.session.receive(bytes((byte,)))
    browser.settle()
    (answer,) = browser.answers("POST")
    results = [line["result"] for line in answer.lines]
    assert [result.get("watch_id") for result in results] == [None, "7", "7", "-1"]
    assert results[2]["canceled"] is True
    assert not answer.is_whole


def test_the_end_of_a_keep_alive_body_is_the_end_of_the_answer(browser: Browser) -> None:
    browser.post("/v3/lease/grant", {"TTL": 60, "ID": 5})
    answer = browser.post("/v3/lease/keepalive", b'{"ID":"5"} {"ID":6}')
    assert answer.is_whole
    assert [line["result"].get("TTL") for line in answer.lines] == ["60", None]
    answer = browser.post("/v3/lease/keepalive", b"")
    assert (answer.status, answer.body, answer.is_whole) == (200, b"", True)
    assert browser.get("/version").status == 200


def test_a_body_of_renewals_waits_while_many_have_no_answer(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Member, "needs_no_round", False)
    session, count = browser.session, MAX_UNANSWERED * 3 // 2
    asked = request("POST", "/v3/lease/keepalive", b'{"ID":5}' * count)
    while asked:
        session.receive(asked[:8192])
        asked = asked[8192:]
        while session.has_more:
            session.produce()
    assert MAX_UNANSWERED <= session.calls.unanswered < MAX_UNANSWERED + 1100
    assert session.inbox.waiting_bytes and not session.is_closing
    browser.settle()
    (answer,) = browser.answers("POST")
    assert answer.is_whole and len(answer.lines) == count


def test_a_stream_that_begins_with_nonsense_is_a_bad_request(browser: Browser) -> None:
    for body in (b'{"create_request":5}', b"[1]", b'{"create_request":{', b'{]{"create'):
        answer = Browser(browser.lone).post("/v3/watch", body)
        assert answer.status == 400, body
        assert answer.json["code"] == 3


def test_nonsense_later_in_a_stream_is_its_last_line(browser: Browser) -> None:
    answer = browser.post("/v3/lease/keepalive", b'{"ID":5}{"ID":"x"}{"ID":5}')
    assert answer.is_whole
    first, last = answer.lines
    assert first["result"]["ID"] == "5"
    failure = last["error"]
    assert failure.keys() == {"grpc_code", "http_code", "message", "http_status"}
    assert (failure["grpc_code"], failure["http_code"]) == (3, 400)
    assert failure["http_status"] == "Bad Request"


def test_the_snapshot_comes_in_lines(browser: Browser) -> None:
    for number in range(30):
        browser.put(b"key-%d" % number, b"v" * 20_000)
    answer = browser.post("/v3/maintenance/snapshot", b"")
    assert answer.is_whole
    blobs = [base64.b64decode(line["result"]["blob"]) for line in answer.lines]
    snapshot = b"".join(blobs)
    assert len(snapshot) > 600_000 and len(snapshot) % 512 == 32
    assert int(answer.lines[0]["result"]["remaining_bytes"]) == len(snapshot) - len(blobs[0])
    assert "remaining_bytes" not in answer.lines[-1]["result"]


def test_locks_and_elections_work(browser: Browser) -> None:
    held = browser.post("/v3/lock/lock", {"name": FOO})
    assert held.status == 200, held
    assert base64.b64decode(held.json["key"]).startswith(b"foo/")
    assert browser.post("/v3/lock/unlock", {"key": held.json["key"]}).status == 200
    led = browser.post("/v3/election/campaign", {"name": BAR, "value": FOO})
    assert led.status == 200, led
    found = browser.post("/v3/election/leader", {"name": BAR})
    assert found.json["kv"]["value"] == FOO
    browser.send(request("POST", "/v3/election/observe", {"name": BAR}))
    (answer,) = browser.answers("POST")
    assert answer.lines[0]["result"]["kv"]["value"] == FOO


def test_a_lock_that_waits_is_answered_when_it_is_free(lone: LoneMember, browser: Browser) -> None:
    held = browser.post("/v3/lock/lock", {"name": FOO}).json["key"]
    other = Browser(lone)
    other.send(request("POST", "/v3/lock/lock", {"name": FOO}))
    assert not other.received
    browser.post("/v3/lock/unlock", {"key": held})
    other.settle()
    (answer,) = other.answers("POST")
    assert answer.json["key"] != held


def test_a_watch_that_is_not_read_holds_back_and_catches_up(lone: LoneMember) -> None:
    watcher, writer = Browser(lone), Browser(lone)
    watcher.send(request("POST", "/v3/watch", {"create_request": {"key": FOO}}))
    for number in range(60):
        writer.put(b"foo", b"%02d" % number + b"v" * 100_000)
    assert watcher.session.outbox.unsent_bytes + watcher.session._jobs_bytes < 2 * HIGH_WATER_BYTES
    assert watcher.session.is_blocked
    watcher.settle()
    (answer,) = watcher.answers("POST")
    events = [event for line in answer.lines[1:] for event in line["result"]["events"]]
    seen = [base64.b64decode(event["kv"]["value"])[:2] for event in events]
    assert seen == [b"%02d" % number for number in range(60)]


def test_a_stream_past_its_deadline_ends_with_an_error(lone: LoneMember, browser: Browser) -> None:
    body = {"create_request": {"key": FOO}}
    browser.send(request("POST", "/v3/watch", body, {"Grpc-Timeout": "1S"}))
    browser.session.tick(lone.now + 2)
    browser.settle()
    (answer,) = browser.answers("POST")
    assert answer.is_whole
    assert answer.lines[-1] == {
        "error": {
            "grpc_code": 4,
            "http_code": 504,
            "message": "context deadline exceeded",
            "http_status": "Gateway Timeout",
        }
    }
    assert lone.member.hub.streams == 0


STREAMS = [
    ("/v3/watch", {"create_request": {"key": FOO}}),
    ("/v3/lease/keepalive", {"ID": "77"}),
    ("/v3/election/observe", {"name": FOO}),
    ("/v3/lock/lock", {"name": FOO}),
    ("/v3/election/campaign", {"name": FOO}),
]


def open_stream(lone: LoneMember, path: str, body: Any, **headers: str) -> Browser:
    """A stream that waits: the name of locks and elections is held by another client."""
    browser = Browser(lone)
    if "keepalive" in path:
        head = request("POST", path, headers={"Transfer-Encoding": "chunked", **headers})
        message = json.dumps(body).encode()
        browser.send(head + b"%x\r\n%s\r\n" % (len(message), message))
    else:
        browser.send(request("POST", path, body, headers))
    assert len(browser.session.calls) == 1
    return browser


def hold_the_name(lone: LoneMember) -> None:
    assert Browser(lone).post("/v3/lock/lock", {"name": FOO}).status == 200


def waiting_keys(lone: LoneMember) -> int:
    every = Browser(lone).post("/v3/kv/range", {"key": b64(b"foo/"), "range_end": b64(b"foo0")})
    return len(every.json["kvs"])


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_hasleader_ends_a_stream_that_lost_its_leader(
    lone: LoneMember, path: str, body: Any
) -> None:
    hold_the_name(lone)
    browser = open_stream(lone, path, body, **{"Grpc-Metadata-hasleader": "true"})
    patient = open_stream(lone, path, body)
    leader = lone.member.raft.leader
    lose_the_leader(lone)
    election_s = lone.member.options.election_timeout_s
    for now in (100.0, 100.0 + 2.9 * election_s):
        browser.session.tick(now)
    assert len(browser.session.calls) == 1
    for one in (browser, patient):
        one.session.tick(100.1 + 3 * election_s)
    assert len(browser.session.calls) == 0 and len(patient.session.calls) == 1
    lone.member.raft.leader, lone.member.raft.role = leader, LEADER
    browser.settle()
    (answer,) = browser.answers("POST")
    assert b"etcdserver: no leader" in answer.body and answer.is_whole


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_deadline_ends_every_kind_of_stream(lone: LoneMember, path: str, body: Any) -> None:
    hold_the_name(lone)
    browser = open_stream(lone, path, body, **{"Grpc-Timeout": "1S"})
    browser.session.tick(lone.now + 0.9)
    assert len(browser.session.calls) == 1
    browser.session.tick(lone.now + 1.1)
    browser.settle()
    (answer,) = browser.answers("POST")
    assert b"context deadline exceeded" in answer.body and answer.is_whole
    assert waiting_keys(lone) == 1
    answer = Browser(lone).post(path, body, **{"Grpc-Timeout": "1n"})
    assert (answer.status, answer.json["message"]) == (504, "context deadline exceeded")
    endless = open_stream(lone, path, body, **{"Grpc-Timeout": "0S"})
    endless.session.tick(lone.now + 1000)
    assert len(endless.session.calls) == 1


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_disconnect_cancels_every_kind_of_stream(lone: LoneMember, path: str, body: Any) -> None:
    hold_the_name(lone)
    browser = open_stream(lone, path, body)
    browser.session.closed()
    lone.settle()
    assert waiting_keys(lone) == 1, "a place in the line ends with its client"
    assert lone.member.hub.streams == 0


def test_a_closed_connection_leaves_nothing_behind(lone: LoneMember) -> None:
    for path, body in (
        ("/v3/watch", {"create_request": {"key": FOO}}),
        ("/v3/maintenance/snapshot", {}),
        ("/v3/kv/range", EVERYTHING),
        ("/v3/election/observe", {"name": FOO}),
    ):
        browser = Browser(lone)
        browser.session.receive(request("POST", path, body))
        browser.session.closed()
        lone.settle()
        assert not browser.session.outbox.parts and not browser.session.has_more
    assert lone.member.hub.streams == 0


def test_a_stopping_server_ends_streams_and_answers_requests(lone: LoneMember) -> None:
    watcher, reader = Browser(lone), Browser(lone)
    watcher.send(request("POST", "/v3/watch", {"create_request": {"key": FOO}}))
    reader.session.receive(request("POST", "/v3/kv/put", {"key": FOO, "value": BAR}))
    for session in (watcher.session, reader.session):
        session.shut_down()
    assert not reader.session.is_idle
    watcher.settle()
    reader.settle()
    watcher.session.shut_down()
    (answer,) = watcher.answers("POST")
    assert answer.is_whole
    assert answer.lines[-1]["error"]["message"] == "etcdserver: server stopped"
    (answer,) = reader.answers("POST")
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert reader.session.is_closing and watcher.session.is_closing
    assert reader.session.is_idle and watcher.session.is_idle


# The connection.


def test_requests_sent_ahead_are_answered_in_order(lone: LoneMember, browser: Browser) -> None:
    count = 300
    data = b"".join(
        request("POST", "/v3/kv/put", {"key": FOO, "value": b64(b"%d" % number)})
        + request("POST", "/v3/kv/range", {"key": FOO})
        for number in range(count)
    )
    browser.send(data)
    answers = browser.answers(*("POST",) * 2 * count)
    assert len(answers) == 2 * count
    values = [answer.json["kvs"][0]["value"] for answer in answers[1::2]]
    assert values == [b64(b"%d" % number) for number in range(count)]
    assert [answer.json["header"]["revision"] for answer in answers[::2]] == [
        str(number + 2) for number in range(count)
    ]


def test_a_flood_of_requests_is_served_in_slices_and_stops_the_reading(
    browser: Browser,
) -> None:
    session = browser.session
    one = request("GET", "/version")
    flood = one * (2 * MAX_WAITING_BYTES // len(one))
    session.receive(flood)
    assert session.has_more and session.is_full
    served = b"".join(session.outbox.parts).count(b"etcdserver")
    assert 0 < served <= 64
    browser.settle()
    assert not session.is_full
    assert len(browser.answers(*("GET",) * 5000)) == flood.count(b"GET")


def test_the_owner_is_told_when_it_may_read_again(lone: LoneMember) -> None:
    calls: list[HttpSession] = []
    session = HttpSession(lone.member, calls.append, Site(lone.member))
    session.receive(request("POST", "/v3/kv/put", headers={"Transfer-Encoding": "chunked"}))
    while not session.is_full:
        session.receive(b"1\r\nx\r\n" * 10_000)
    assert not calls
    while session.is_full:
        assert session.has_more
        session.produce()
    assert calls == [session] and not session.outbox.parts


def test_a_client_that_sends_too_much_behind_a_request_is_disconnected(browser: Browser) -> None:
    session = browser.session
    session.receive(request("POST", "/v3/kv/range", {"key": FOO}))
    piece = request("GET", "/version") * 1000
    sent = 0
    while not session.is_aborted:
        session.receive(piece)
        sent += len(piece)
        assert sent < MAX_UNREAD_BYTES + 2 * len(piece)
    assert session.is_closing and not session.inbox.waiting_bytes


def test_a_client_that_sends_requests_behind_a_watch_is_disconnected(browser: Browser) -> None:
    browser.send(request("POST", "/v3/watch", {"create_request": {"key": FOO}}))
    browser.session.receive(request("GET", "/version"))
    assert not browser.session.is_aborted
    browser.session.receive(request("GET", "/version") * 2000)
    assert browser.session.is_aborted
    assert browser.lone.member.hub.streams == 0


def test_an_expectation_is_met_before_the_body(browser: Browser) -> None:
    body = b'{"key":"Zm9v"}'
    head = f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    browser.send(b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\n" + head)
    assert browser.received == b"HTTP/1.1 100 Continue\r\n\r\n"
    browser.received = b""
    browser.send(body)
    (answer,) = browser.answers("POST")
    assert answer.status == 200


def test_http_1_0_is_answered_and_closed(browser: Browser) -> None:
    browser.send(b"GET /health HTTP/1.0\r\n\r\n")
    assert browser.received.startswith(b"HTTP/1.1 200 ")
    assert browser.received.endswith(b'{"health":"true","reason":""}')
    assert browser.session.is_closing
    browser = Browser(browser.lone)
    body = b'{"create_request":{"key":"Zm9v"}}'
    browser.send(b"POST /v3/watch HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert b"chunked" not in browser.received
    assert browser.received.endswith(b'"created":true}}\n')


def test_connection_close_is_heeded(browser: Browser) -> None:
    answer = browser.get("/version", Connection="close")
    assert answer.headers["connection"] == "close"
    assert browser.session.is_closing


def test_an_upgrade_is_declined(browser: Browser) -> None:
    answer = browser.get("/version", Connection="Upgrade, HTTP2-Settings", Upgrade="h2c")
    assert answer.status == 200
    assert browser.get("/version").status == 200


def refused(browser: Browser, data: bytes) -> Answer:
    """The answer to what cannot be followed: the last one on its connection."""
    browser.send(data)
    (answer,) = browser.answers("POST")
    assert answer.headers["connection"] == "close"
    browser.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert not browser.received, "it serves what comes behind bytes that it could not follow"
    browser.session.tick(browser.lone.now + LINGER_S + 1)
    assert browser.session.is_closing
    return answer


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
        (400, b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
        (400, b"Content-Length: 5, 6\r\n\r\nhello"),
        (400, b"Content-Length: -5\r\n\r\n"),
        (400, b"Content-Length: +5\r\n\r\nhello"),
        (400, b"Content-Length: 0x5\r\n\r\nhello"),
        (501, b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        (501, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\nx\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n-1\r\n"),
        pytest.param(
            400,
            b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
            marks=pytest.mark.skipif(h11.__version__ < "0.16", reason="CVE-2025-43859 of h11"),
        ),
        (400, b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 30 + b"5\r\nhello\r\n0\r\n\r\n"),
        (400, b"Host: y\r\n\r\n"),
        (400, b"no colon\r\n\r\n"),
        (400, b"Bad Name: x\r\n\r\n"),
        (400, b"X: \x00\r\n\r\n"),
        (431, b"X: " + b"y" * (MAX_HEAD_BYTES + 70_000)),
        (431, b"X: y\r\n" * (MAX_HEAD_BYTES // 5)),
        (431, b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * (MAX_HEAD_BYTES // 5)),
        (431, b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * (MAX_HEAD_BYTES + 70_000)),
    ],
)
def test_smuggling_and_nonsense_are_refused(browser: Browser, status: int, data: bytes) -> None:
    answer = refused(browser, b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\n" + data)
    assert answer.status == status, answer


@pytest.mark.parametrize(
    "begin", [b"", b"Transfer-Encoding: chunked\r\n\r\n5\r\n\n\n\n\n\n\r\n0\r\n"]
)
def test_a_head_of_very_many_lines_is_not_parsed(browser: Browser, begin: bytes) -> None:
    head = b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\n" + begin
    answer = refused(browser, head + b"a:\n" * (MAX_HEAD_LINES + PIECE_BYTES))
    assert answer.status == 431, answer
    browser = Browser(browser.lone)
    browser.send(
        head + b"a:\n" * (MAX_HEAD_LINES - 20) + b"Content-Length: 0\r\n" * (not begin) + b"\r\n"
    )
    (answer,) = browser.answers("POST")
    assert answer.status == 400, answer


@pytest.mark.parametrize("other", [b"", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("verb", [b"GET", b"HEAD", b"POST", b"CONNECT", b"OPTIONS"])
def test_a_length_of_thousands_of_digits_is_refused(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, verb: bytes, other: bytes
) -> None:
    """By every version of h11: before 0.16, which Debian has, it does not limit the digits."""
    limit = "h11._headers.CONTENT_LENGTH_MAX_DIGITS"
    monkeypatch.setattr(limit, MAX_HEAD_BYTES, raising=False)
    length = b"Content-Length: " + b"9" * 5000 + b"\r\n"
    browser.send(verb + b" /health HTTP/1.1\r\nHost: x\r\n" + length + other + b"\r\n")
    assert browser.received.startswith(b"HTTP/1.1 400 ")
    assert b"Connection: close" in browser.received and not browser.session.has_more
    browser.received = b""
    browser.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert not browser.received


@pytest.mark.parametrize(
    "data",
    [
        b"GET\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(browser: Browser, data: bytes) -> None:
    answer = refused(browser, data)
    assert answer.status == 400, answer


def test_other_versions_of_http_are_refused(browser: Browser) -> None:
    for version in ("2.0", "0.9", "9.9"):
        answer = refused(
            Browser(browser.lone), f"GET /health HTTP/{version}\r\nHost: x\r\n\r\n".encode()
        )
        assert answer.status == 505, version


def test_a_gigabyte_is_refused_before_any_of_it_is_read(browser: Browser) -> None:
    head = b"POST /v3/kv/put HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n"
    answer = refused(browser, head + b"\r\n")
    assert answer.status == 413
    assert answer.json["message"] == "etcdserver: request is too large"
    browser = Browser(browser.lone)
    answer = refused(browser, head.replace(b"100", b"9" * 30) + b"\r\n")
    assert answer.status in (400, 413)
    browser = Browser(browser.lone)
    answer = refused(browser, head + b"Expect: 100-continue\r\n\r\n")
    assert answer.status == 413
    assert Browser(browser.lone).get("/health").status == 200


def test_a_gigabyte_in_chunks_is_refused_when_it_is_too_much(browser: Browser) -> None:
    browser.send(request("POST", "/v3/kv/put", headers={"Transfer-Encoding": "chunked"}))
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    while not browser.session._discards:
        browser.send(chunk)
        sent += 65536
        assert sent < browser.session.site.max_body_bytes + 2 * 65536
    (answer,) = browser.answers("POST")
    assert answer.status == 413
    assert browser.session._request is None


def test_a_message_of_a_stream_that_never_ends_is_refused(browser: Browser) -> None:
    browser.send(request("POST", "/v3/watch", headers={"Transfer-Encoding": "chunked"}))
    browser.send(b"B\r\n" + b'{"x":["aaaa' + b"\r\n")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    for _ in range(browser.session.site.max_body_bytes // 65536 + 1):
        browser.send(chunk)
    (answer,) = browser.answers("POST")
    assert answer.json["message"] == "etcdserver: request is too large"
    assert answer.headers["connection"] == "close"


def test_a_large_body_may_take_longer(lone: LoneMember) -> None:
    now = lone.now
    browser = Browser(lone)
    length = browser.session.site.max_body_bytes
    browser.send(b"POST /v3/kv/put HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{" % length)
    enough_s = BODY_TIMEOUT_S + length / MIN_RECEIVED_BYTES_PER_S
    browser.session.tick(now + enough_s - 1)
    browser.flush()
    assert not browser.received
    browser.session.tick(now + enough_s + 1)
    (answer,) = (browser.flush(), browser.answers("POST"))[1]
    assert answer.status == 408


def test_slow_clients_are_given_up(lone: LoneMember) -> None:
    now = lone.now
    slow, slower, idle, quick = (Browser(lone) for _ in range(4))
    slow.send(b"GET /health HTTP/1.1\r\n")
    slower.send(b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    idle.get("/health")
    quick.get("/health")
    assert not slow.session.is_open and slower.session.is_open
    for step in range(int(HEAD_TIMEOUT_S) + 1):
        lone.now = now + step
        slow.send(b"X: y\r\n")
        slow.session.tick(lone.now + 0.5)
    assert slow.session.is_closing
    slower.session.tick(now + BODY_TIMEOUT_S - 1)
    assert not slower.session.is_closing
    slower.session.tick(now + BODY_TIMEOUT_S + 1)
    (answer,) = (slower.flush(), slower.answers("POST"))[1]
    assert answer.status == 408
    idle.session.tick(now + IDLE_TIMEOUT_S - 1)
    assert not idle.session.is_closing
    idle.session.tick(now + IDLE_TIMEOUT_S + 1)
    assert idle.session.is_closing
    lone.now = now + IDLE_TIMEOUT_S - 1
    quick.get("/health")
    quick.session.tick(now + IDLE_TIMEOUT_S + 1)
    assert not quick.session.is_closing


def test_a_watch_may_be_silent_for_ever(lone: LoneMember, browser: Browser) -> None:
    browser.send(request("POST", "/v3/watch", headers={"Transfer-Encoding": "chunked"}))
    browser.send(b'21\r\n{"create_request":{"key":"Zm9v"}}\r\n')
    browser.session.tick(lone.now + 1e6)
    assert not browser.session.is_closing
    assert browser.session.is_idle


# Who may ask.


def test_hosts_that_are_not_on_the_list_are_refused(lone: LoneMember) -> None:
    site = Site(lone.member, host_whitelist=["localhost", "127.0.0.1", "::1"])
    browser = Browser(lone, site)
    head = "%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s"
    watch = '{"create_request":{"key":"Zm9v"}}'
    for host in ("localhost", "localhost:2379", "127.0.0.1:2379", "[::1]:2379", "[::1]"):
        browser.send((head % ("GET", "/health", host, 0, "")).encode())
        assert browser.answers("GET")[0].status == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:2379", ""):
        for verb, path, body in (
            ("GET", "/health", ""),
            ("POST", "/v3/kv/put", '{"key":"Zm9v"}'),
            ("POST", "/v3/watch", watch),
            ("OPTIONS", "/v3/kv/put", ""),
        ):
            browser.send((head % (verb, path, host, len(body), body)).encode())
            (answer,) = browser.answers(verb)
            assert answer.status == 421, (host, path)
            assert b"host-whitelist" in answer.body
            assert "access-control-allow-origin" not in answer.headers
    assert lone.member.state.store.revision == 1


@pytest.mark.parametrize(
    "target, host, status",
    [
        ("http://evil.example/health", "localhost", 421),
        ("HTTP://evil.example:2379/health", "localhost", 421),
        ("http://localhost@evil.example/health", "localhost", 421),
        ("http://localhost:2379/health", "evil.example", 200),
        ("https://user@localhost/health", "localhost", 200),
    ],
)
def test_the_host_in_a_target_counts_and_not_the_header(
    lone: LoneMember, target: str, host: str, status: int
) -> None:
    browser = Browser(lone, Site(lone.member, host_whitelist=["localhost"]))
    browser.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    (answer,) = browser.answers("GET")
    assert answer.status == status


def test_origins_are_allowed_as_configured(lone: LoneMember) -> None:
    name = "access-control-allow-origin"
    anyone = Browser(lone).get("/version", Origin="http://a.example")
    assert anyone.headers[name] == "*"
    assert anyone.headers["access-control-allow-headers"] == "accept, content-type, authorization"
    browser = Browser(lone, Site(lone.member, cors=["http://a.example"]))
    assert browser.get("/version", Origin="http://a.example").headers[name] == "http://a.example"
    answer = browser.ask("OPTIONS", "/v3/kv/put", headers={"Origin": "http://a.example"})
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert name not in browser.get("/version", Origin="http://b.example").headers
    assert name not in browser.get("/version").headers


def test_a_page_of_another_origin_cannot_write(lone: LoneMember) -> None:
    own, other, foreign = "http://localhost", "http://a.example", "http://b.example"
    put = json.dumps({"key": FOO, "value": BAR}).encode()
    closed = Site(lone.member, cors=[other], host_whitelist=["localhost"])
    text = {"Content-Type": "text/plain"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    as_json = {"Content-Type": "application/json; charset=utf-8"}
    for site, origin, content_type, status in (
        (closed, foreign, text, 403),
        (closed, foreign, as_json, 403),
        (closed, "null", {}, 403),
        (closed, other, text, 415),
        (closed, other, as_json, 200),
        (closed, own, as_json, 200),
        (closed, own, form, 415),
        (None, foreign, text, 415),
        (None, foreign, as_json, 200),
        (None, foreign, {}, 415),
        (closed, own, {}, 415),
    ):
        answer = Browser(lone, site).post("/v3/kv/put", put, Origin=origin, **content_type)
        assert answer.status == status, (origin, content_type)
    before = lone.member.hub.streams
    for path in ("/v3/watch", "/v3/lease/keepalive"):
        answer = Browser(lone, closed).post(path, b'{"ID":"1"}', Origin=foreign, **text)
        assert answer.status == 403
    assert lone.member.hub.streams == before
    # Without an Origin it is no page: curl sends forms.
    assert Browser(lone, closed).post("/v3/kv/put", put, **form).status == 200


def test_by_default_pages_of_other_sites_can_neither_read_nor_write(lone: LoneMember) -> None:
    """Each request is one that a page can make a browser send."""
    site = Site(lone.member, cors=(), host_whitelist=(), own_hosts=("m1.lab", "Box"))
    put = json.dumps({"key": FOO, "value": BAR}).encode()
    evil = "http://evil.example"

    def ask(verb: str, path: str, host: str, body: bytes = b"", **headers: str) -> Answer:
        browser = Browser(lone, site, is_local=True)
        named = {"Host": host, "Content-Length": str(len(body)), **headers}
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items())
        browser.send(f"{verb} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        (answer,) = browser.answers(verb)
        assert answer.headers.get("access-control-allow-origin") is None, (verb, path, headers)
        return answer

    simple = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x")
    for path, body in (
        ("/v3/kv/put", put),
        ("/v3/kv/range", json.dumps(EVERYTHING).encode()),
        ("/v3/watch", b'{"create_request":{"key":"Zm9v"}}'),
        ("/v3/lease/keepalive", b'{"ID":"1"}'),
        ("/v3/maintenance/snapshot", b"{}"),
    ):
        for content_type in (*simple, "application/json"):
            for origin in (
                evil,
                "null",
                "http://localhost:8080",
                "https://localhost:2379.evil.example",
            ):
                answer = ask("POST", path, "localhost:2379", body, Origin=origin,
                             Content_Type=content_type)  # fmt: skip
                assert answer.status == 403 and b"cors" in answer.body, (path, origin)
        # A body without a type, as of a Blob, is sent without asking, too.
        assert ask("POST", path, "127.0.0.1:2379", body, Origin=evil).status == 403
        assert ask("POST", path, "0.0.0.0:2379", body, Origin=evil).status == 403
        # DNS rebinding: the page is of the same origin as the server.
        for host in ("evil.example:2379", "localhost.evil.example", "127.0.0.1.evil.example:2379"):
            answer = ask("POST", path, host, body, Origin=f"http://{host}",
                         Content_Type="application/json")  # fmt: skip
            assert answer.status == 421 and b"host-whitelist" in answer.body
        # Nothing has an effect as a GET: an image, a script, a link, a WebSocket.
        assert ask("GET", path, "localhost:2379").status == 405
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Key": "eA=="}
        answer = ask("GET", f"{path}?method=POST", "localhost:2379", Origin=evil, **upgrade)
        assert answer.status == 405
    for path in ("/", "/health", "/metrics", "/debug/vars", "http://evil.example/health"):
        assert ask("GET", path, "evil.example:2379").status == 421
        # The answer of a foreign page's GET is without a permission to read it.
        assert ask("GET", path, "evil.example", Origin=evil).status == 421
    assert ask("GET", "/health", "localhost:2379", Origin=evil).status == 200
    # The question before JSON is sent gets no permission.
    asked = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "content-type",
    }
    answer = ask("OPTIONS", "/v3/kv/put", "localhost:2379", Origin=evil, **asked)
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert (lone.member.state.store.revision, lone.member.hub.streams) == (1, 0)


def test_by_default_everyone_else_goes_on(lone: LoneMember) -> None:
    site = Site(lone.member, cors=(), host_whitelist=(), own_hosts=("m1.lab", "Box"))
    put = json.dumps({"key": FOO, "value": BAR}).encode()
    hosts = ("localhost:2379", "LOCALHOST", "localhost.", "app.localhost:80", "127.0.0.1:2379",
             "127.9.9.9", "[::1]:2379", "10.0.0.1", "m1.lab:2379", "M1.LAB", "box")  # fmt: skip
    for host in hosts:
        # The server's own page.
        own = {"Host": host, "Origin": f"http://{host.lower()}", "Content-Type": "application/json"}
        # curl, etcd3gw, Patroni and others send no Origin, and any content type.
        plain = {"Host": host, "Content-Type": "application/x-www-form-urlencoded"}
        for headers in (own, plain, {"Host": host}, {"Host": host, "Content-Type": "text/plain"}):
            browser = Browser(lone, site, is_local=True)
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            length = f"Content-Length: {len(put)}\r\n\r\n"
            browser.send(f"POST /v3/kv/put HTTP/1.1\r\n{head}{length}".encode() + put)
            assert browser.answers("POST")[0].status == 200, headers
    for is_local in (True, False):
        # HAProxy's health check sends no host.
        browser = Browser(lone, site, is_local)
        browser.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert browser.answers("GET")[0].status == 200
    # At other addresses the server may have any name.
    browser = Browser(lone, site)
    browser.send(b"GET /health HTTP/1.1\r\nHost: etcd.example\r\n\r\n")
    assert browser.answers("GET")[0].status == 200
    browser = Browser(lone, site, is_local=True)
    browser.send(b"POST /v3/kv/put HTTP/1.0\r\nOrigin: null\r\nContent-Length: 2\r\n\r\n{}")
    assert browser.answers("POST")[0].status == 403


def test_the_gateway_can_be_switched_off(lone: LoneMember) -> None:
    browser = Browser(lone, Site(lone.member, serves_gateway=False))
    for path in ("/v3/kv/put", "/v3/watch", "/v3/lease/keepalive"):
        answer = browser.post(path, {"key": FOO})
        assert (answer.status, b"switched off" in answer.body) == (404, True), path
    assert browser.get("/health").status == 200


# The page.


def test_the_page_is_one_file_that_may_run_only_its_own_script(browser: Browser) -> None:
    answer = browser.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page = answer.body.decode()
    assert page.count("<script>") == page.count("<style>") == 1
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert "innerHTML" not in page and "document.write" not in page
    assert not re.search(r"\son\w+=", page) and not re.search(r"\sstyle=", page)
    assert len(answer.body) < 40_000


def test_the_page_only_reads(browser: Browser) -> None:
    page = browser.get("/").body.decode()
    assert set(re.findall(r'"(/v3/[^"]*)"', page)) == {
        "/v3/maintenance/status",
        "/v3/cluster/member/list",
        "/v3/kv/range",
        "/v3/auth/authenticate",
    }


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_page_is_valid(browser: Browser, tmp_path: Path) -> None:
    page = browser.get("/").body.decode()
    script = tmp_path / "page.js"
    script.write_text(page.partition("<script>")[2].partition("</script>")[0])
    done = subprocess.run(["node", "--check", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The mapping.


def messages(cls: type[proto.Message], depth: int = 2) -> st.SearchStrategy[Any]:
    """Any message, as a member could send it."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in cls.FIELDS:
        kind = field.kind
        if kind == "message":
            if depth == 0:
                continue
            values = messages(proto.MESSAGES[field.type_name], depth - 1)
        elif kind == "bytes":
            values = st.binary(max_size=20)
        elif kind == "string":
            values = st.text(max_size=10) | st.sampled_from(["<a&b>", "\u2028\u2029", '"\\\n\x00'])
        elif kind == "bool":
            values = st.booleans()
        elif kind == "enum":
            values = st.sampled_from(sorted(proto.ENUMS[field.type_name].values())) | st.just(77)
        else:
            bits = 64 if kind.endswith("64") else 32
            low = -(1 << bits - 1) if kind.startswith("int") else 0
            values = st.integers(low, (1 << bits - (kind.startswith("int"))) - 1)
        fields[field.name] = st.lists(values, max_size=3) if field.repeated else values
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: one_of_each(cls, values))


def one_of_each(cls: type[proto.Message], values: dict[str, Any]) -> proto.Message:
    """Leave one member of each oneof."""
    seen = set()
    for field in cls.FIELDS:
        if field.oneof and field.name in values:
            if field.oneof in seen:
                del values[field.name]
            seen.add(field.oneof)
    return cls(**values)


RESPONSES = sorted({method.response.NAME for method in methods.METHODS.values()})


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_responses_are_written_as_the_plain_mapping_writes_them(data: st.DataObject) -> None:
    cls = proto.MESSAGES[data.draw(st.sampled_from(RESPONSES))]
    body = data.draw(messages(cls)).encode()
    written = "".join(json_mapping.pieces(cls, body))
    assert json.loads(written) == plain_json(cls.decode(body))
    assert json.dumps(json.loads(written), separators=(",", ":")) == json.dumps(
        plain_json(cls.decode(body)), separators=(",", ":")
    )
    assert not re.search("[<>&\u2028\u2029\x00-\x1f]", written)


def test_a_large_response_is_written_in_pieces_of_about_the_named_size() -> None:
    kvs = [proto.KeyValue(key=b"%d" % n, value=b"v" * 100) for n in range(10_000)]
    response = proto.ResponseOp(response_range=proto.RangeResponse(kvs=kvs, count=10_000))
    body = proto.TxnResponse(responses=[response]).encode()
    pieces = list(json_mapping.pieces(proto.TxnResponse, body))
    assert max(map(len, pieces)) < 3 * json_mapping.PIECE_BYTES
    assert json.loads("".join(pieces)) == plain_json(proto.TxnResponse.decode(body))


def test_a_response_of_very_many_small_messages_is_written_in_small_pieces() -> None:
    leases = [proto.LeaseStatus(ID=n) for n in range(1, 20_000)]
    body = proto.LeaseLeasesResponse(leases=leases).encode()
    pieces = list(json_mapping.pieces(proto.LeaseLeasesResponse, body))
    assert max(piece.count("ID") for piece in pieces) < json_mapping.PIECE_PARTS
    assert json.loads("".join(pieces)) == plain_json(proto.LeaseLeasesResponse.decode(body))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_stream_is_cut_into_its_objects_whatever_the_pieces(
    objects: list[Any], rng: random.Random
) -> None:
    text = "".join(json.dumps(item) + rng.choice(("", " ", "\r\n\t")) for item in objects).encode()
    values = gateway.Values(1 << 20)
    found = []
    at = 0
    while at < len(text):
        step = rng.randint(1, 7)
        found += values.feed(text[at : at + step])
        at += step
    assert [json.loads(value) for value in found] == objects
    assert not len(values)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]"\\:,a1 ').map(str.encode))
def test_no_body_makes_the_mapping_raise_anything_else(data: bytes) -> None:
    with contextlib.suppress(EtcdError):
        gateway.read_request(proto.TxnRequest, data, 100)
    values = gateway.Values(30)
    with contextlib.suppress(EtcdError):
        for byte in data:
            values.feed(bytes((byte,)))


def test_statuses_are_those_of_grpc_gateway() -> None:
    statuses = [gateway.HTTP_STATUS[code] for code in range(17)]
    assert statuses == [
        200, 408, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401,
    ]  # fmt: skip
    assert set(statuses) <= gateway.REASONS.keys()
    assert gateway.error_json(error("KeyNotFound")).count("etcdserver: key not found") == 2


# Anything at all.

_GOOD = [
    request("GET", "/health"),
    request("GET", "/readyz?verbose"),
    request("HEAD", "/"),
    request("OPTIONS", "/v3/kv/put"),
    request("POST", "/v3/kv/put", {"key": FOO, "value": BAR}),
    request("POST", "/v3/kv/range", EVERYTHING),
    request("POST", "/v3/lease/keepalive", {"ID": 5}),
    request("POST", "/v3/kv/range", {"key": FOO}, {"Grpc-Timeout": "1S"}),
    request("POST", "/v3/watch", {"create_request": {"key": FOO}}),
    request("POST", "/v3/lock/lock", {"name": FOO}),
    request("POST", "/v3/maintenance/snapshot"),
    b"POST /v3/watch HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    b'21\r\n{"create_request":{"key":"Zm9v"}}\r\n',
    b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5;x=y\r\n{"key\r\n9\r\n":"Zm9v"}\r\n0\r\nTrailer: x\r\n\r\n',
    b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"0\r\n\r\n",
    b"\r\n",
    b"Content-Length: 7\r\n",
    b"Transfer-Encoding: chunked\r\n",
]


@pytest.fixture(scope="module")
def shared_lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoneMember]:
    lone = LoneMember(tmp_path_factory.mktemp("http") / "member")
    lone.elect()
    yield lone
    lone.close()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.lists(st.sampled_from(_GOOD) | st.binary(max_size=30), max_size=8),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    rng=st.randoms(use_true_random=False),
)
def test_no_bytes_disturb_the_server(
    shared_lone: LoneMember,
    parts: list[bytes],
    changes: list[tuple[int, int]],
    rng: random.Random,
) -> None:
    data = bytearray(b"".join(parts))
    for at, byte in changes:
        if data:
            data[at % len(data)] = byte
    browser = Browser(shared_lone, Site(shared_lone.member, metrics=lambda: b"etcdlite_up 1\n"))
    session = browser.session
    at = 0
    try:
        while at < len(data) and not session.is_closing:
            step = rng.choice((1, 5, 50, 5000))
            session.receive(bytes(data[at : at + step]))
            if rng.random() < 0.5:
                browser.settle()
            if rng.random() < 0.1:
                session.tick(shared_lone.now + rng.choice((0, 30, 1000)))
            at += step
        browser.settle()
        if rng.random() < 0.5:
            session.shut_down()
            browser.settle()
    finally:  # Hypothesis breaks off examples that draw too much.
        session.closed()
        shared_lone.settle()
    assert shared_lone.member.hub.streams == 0
    assert Browser(shared_lone).get("/health").status == 200


# Over sockets.


class Loop(threading.Thread):
    """Serves a lone member's HTTP on a port: the least of what `server.py` does."""

    def __init__(self, lone: LoneMember, **options: Any) -> None:
        super().__init__(daemon=True)
        self.lone = lone
        lone.now = time.monotonic()
        self.site = Site(lone.member, metrics=lambda: b"etcdlite_up 1\n", **options)
        self.failures: queue.Queue[BaseException] = queue.Queue()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._sessions: dict[socket.socket, HttpSession] = {}
        self._is_over = False

    def run(self) -> None:
        try:
            while not self._is_over:
                self._turn()
        except BaseException as failure:
            self.failures.put(failure)
        for sock in [self._listener, *self._sessions]:
            sock.close()
        self._selector.close()

    def _turn(self) -> None:
        is_busy = any(session.has_more for session in self._sessions.values())
        for key, mask in self._selector.select(0 if is_busy else 0.02):
            sock: Any = key.fileobj
            if sock is self._listener:
                sock, _ = sock.accept()
                sock.setblocking(False)
                self._sessions[sock] = HttpSession(
                    self.lone.member, lambda session: None, self.site
                )
                self._selector.register(sock, selectors.EVENT_READ)
            elif mask & selectors.EVENT_READ:
                self._receive(sock)
        self.lone.now = time.monotonic()
        self.lone.member.tick()
        self.lone.settle()
        for sock, session in list(self._sessions.items()):
            session.tick(self.lone.now)
            if session.has_more:
                session.produce()
            self._send(sock, session)

    def _receive(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(65536)
        except ConnectionError:
            data = b""
        if data:
            self._sessions[sock].receive(data)
        else:
            self._close(sock)

    def _send(self, sock: socket.socket, session: HttpSession) -> None:
        was_blocked = session.is_blocked
        outbox = session.outbox
        while outbox.unsent_bytes:
            try:
                sent = sock.send(outbox.take())
            except BlockingIOError:
                sent = 0
            except ConnectionError:
                self._close(sock)
                return
            outbox.sent(sent)
            if outbox.is_stuck:
                break
        if was_blocked and not session.is_blocked:
            session.unblocked()
        if session.is_closing and not session.outbox.unsent_bytes:
            self._close(sock)
            return
        mask = selectors.EVENT_WRITE if outbox.is_stuck else 0
        if not (session.is_closing or session.is_full or outbox.unsent_bytes > HIGH_WATER_BYTES):
            mask |= selectors.EVENT_READ
        self._selector.modify(sock, mask or selectors.EVENT_WRITE)

    def _close(self, sock: socket.socket) -> None:
        self._sessions.pop(sock).closed()
        self._selector.unregister(sock)
        sock.close()

    def stop(self) -> None:
        self._is_over = True
        self.join(PATIENCE_S)
        if not self.failures.empty():
            raise self.failures.get()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    lone = LoneMember(tmp_path / "member")
    lone.elect()
    loop = Loop(lone)
    loop.start()
    yield loop
    loop.stop()
    lone.close()


def test_python_s_own_client_works(loop: Loop) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", loop.port, timeout=PATIENCE_S)
    value = b64(os.urandom(1_000_000))
    for number in range(3):
        body = json.dumps({"key": b64(b"key-%d" % number), "value": value})
        connection.request("POST", "/v3/kv/put", body)
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (200, True)
    connection.request("POST", "/v3/kv/range", json.dumps(EVERYTHING))
    found = json.loads(connection.getresponse().read())
    assert [kv["value"] for kv in found["kvs"]] == [value] * 3
    connection.close()


def test_a_refused_upload_can_read_why(loop: Loop) -> None:
    with socket.create_connection(("127.0.0.1", loop.port), PATIENCE_S) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        for _ in range(20):
            sock.sendall(b"x" * 50_000)
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while piece := sock.recv(65536):
            data += piece
    assert data.startswith(b"HTTP/1.1 413 "), data


def test_other_connections_do_not_notice_a_hostile_one(loop: Loop) -> None:
    hostile = [socket.create_connection(("127.0.0.1", loop.port), PATIENCE_S) for _ in range(50)]
    for number, sock in enumerate(hostile):
        sock.sendall(_GOOD[number % len(_GOOD)][:-1])
    connection = http.client.HTTPConnection("127.0.0.1", loop.port, timeout=PATIENCE_S)
    for _ in range(20):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"health":"true","reason":""}'
    connection.close()
    for sock in hostile:
        sock.close()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_members_keys_and_a_value(loop: Loop, tmp_path: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", loop.port, timeout=PATIENCE_S)
    for key, value in (("/config/color", "blue & <b>green</b>"), ("/config/size", "7")):
        body = json.dumps({"key": b64(key.encode()), "value": b64(value.encode())})
        connection.request("POST", "/v3/kv/put", body)
        connection.getresponse().read()
    connection.close()
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"http://127.0.0.1:{loop.port}/#%2Fconfig%2Fcolor",
        ],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    page = done.stdout
    for shown in (
        '<dd id="leader" class="">lone<small>7</small></dd>',
        '<dd id="revision">3<small>',
        '>lone</td><td><span class="tag">leader</span></td>',
        '<button class="key" type="button">/config/color</button>',
        '<h2 id="value-key" class="mono">/config/color</h2>',
        "blue &amp; &lt;b&gt;green&lt;/b&gt;</pre>",
    ):
        assert shown in page, (shown, page[page.find("<body>") :][:6000], done.stderr[-1000:])
    assert "/config/size" not in page


# Beside a real etcd, with curl.


@pytest.fixture
def etcd_port(tmp_path: Path) -> Iterator[int]:
    with running_etcd(tmp_path / "etcd") as endpoint:
        yield int(endpoint.rpartition(":")[2])


EXAMPLES = r"""
curl -L http://localhost:2379/v3/kv/put -X POST -d '{"key": "Zm9v", "value": "YmFy"}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "Zm9v"}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "Zm9v", "range_end": "Zm9w"}'
curl -L http://localhost:2379/v3/kv/txn -X POST -d '{"compare":[{"target":"CREATE","key":"Zm9v","createRevision":"2"}],"success":[{"requestPut":{"key":"Zm9v","value":"YmFy"}}]}'
curl -L http://localhost:2379/v3/kv/txn -X POST -d '{"compare":[{"version":"4","result":"EQUAL","target":"VERSION","key":"Zm9v"}],"success":[{"requestRange":{"key":"Zm9v"}}]}'
curl -L http://localhost:2379/v3/kv/txn -X POST -d '{"compare":[{"version":"2","result":"EQUAL","target":"VERSION","key":"Zm9v"}],"success":[{"requestRange":{"key":"Zm9v"}}]}'
curl -L http://localhost:2379/v3/lease/grant -X POST -d '{"TTL": 600, "ID": 77}'
curl -L http://localhost:2379/v3/lease/grant -X POST -d '{"TTL": 600, "ID": 77}'
curl -L http://localhost:2379/v3/kv/put -X POST -d '{"key": "Zm9vMg==", "value": "YmFy", "lease": "77", "prev_kv": true}'
curl -L http://localhost:2379/v3/lease/keepalive -X POST -d '{"ID": 77}'
curl -L http://localhost:2379/v3/lease/keepalive -X POST -d '{"ID": 77} {"ID": 78}'
curl -L http://localhost:2379/v3/lease/timetolive -X POST -d '{"ID": 77, "keys": true}'
curl -L http://localhost:2379/v3/kv/lease/timetolive -X POST -d '{"ID": 78}'
curl -L http://localhost:2379/v3/lease/leases -X POST -d '{}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "AA==", "range_end": "AA==", "sort_order": "DESCEND", "sort_target": "KEY", "limit": "1"}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "AA==", "range_end": "AA==", "count_only": true}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "AA==", "range_end": "AA==", "keys_only": true}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "Zm9v", "revision": 99}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "Zm9v"'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "Zm9v"} and so on'
curl -L http://localhost:2379/v3/kv/range -X POST -d 'null'
curl -L http://localhost:2379/v3/kv/put -X POST -d '{"key": "Zm9v", "lease": 99}'
curl -L http://localhost:2379/v3/lease/revoke -X POST -d '{"ID": 77}'
curl -L http://localhost:2379/v3/lease/revoke -X POST -d '{"ID": 77}'
curl -L http://localhost:2379/v3/kv/deleterange -X POST -d '{"key": "Zm9v", "prev_kv": true}'
curl -L http://localhost:2379/v3/kv/compaction -X POST -d '{"revision": 3}'
curl -L http://localhost:2379/v3/kv/compaction -X POST -d '{"revision": 3}'
curl -L http://localhost:2379/v3/kv/range -X POST -d '{"key": "Zm9v", "revision": 2}'
curl -L http://localhost:2379/v3/maintenance/alarm -X POST -d '{}'
curl -L http://localhost:2379/v3/election/leader -X POST -d '{"name": "Zm9v"}'
curl -L http://localhost:2379/v3beta/kv/range -X POST -d '{"key": "Zm9v"}'
curl -L http://localhost:2379/v3/kv/range
curl -L http://localhost:2379/v3/kv/range -X POST -H 'Grpc-Timeout: soon' -d '{"key": "Zm9v"}'
curl -0 http://localhost:2379/v3/kv/range -X POST -d '{"key": "Zm9v"}'
curl -X OPTIONS http://localhost:2379/v3/kv/range
curl http://localhost:2379/health
curl http://localhost:2379/health?serializable=true
curl -X POST http://localhost:2379/health
curl http://localhost:2379/nothing
"""  # noqa: E501
"""From etcd's documentation of the gateway and of its operation, and some of what goes wrong."""

WATCH = """
curl -N http://localhost:2379/v3/watch -X POST -d '{"create_request": {"key":"Zm9v"} }'
"""
MASKED = ("cluster_id", "member_id", "raft_term")
PLAIN_HEADERS = ("access-control-", "content-type:", "grpc-metadata", "allow:")


def curl(command: str, port: int) -> list[str]:
    return shlex.split(command.replace("localhost:2379", f"127.0.0.1:{port}"))


def mask(text: str) -> str:
    text = re.sub(rf'"({"|".join(MASKED)})":"\d+"', r'"\1":"-"', text)
    return re.sub(r'"TTL":"(600|599)"', '"TTL":"600"', text)


def run_example(command: str, port: int) -> tuple[str, list[str], str]:
    """Status, the headers that matter, and the body as it is printed."""
    arguments = [*curl(command, port), "-s", "-i", "--max-time", str(PATIENCE_S)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done)
    printed = done.stdout.replace("\r\n", "\n").removeprefix("HTTP/1.1 100 Continue\n\n")
    head, _, body = printed.partition("\n\n")
    status, *headers = head.split("\n")
    shown = sorted(line for line in headers if line.lower().startswith(PLAIN_HEADERS))
    return status.partition(" ")[2], shown, mask(body)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_documented_examples_print_what_etcd_prints(loop: Loop, etcd_port: int) -> None:
    for command in EXAMPLES.strip().splitlines():
        ours, theirs = run_example(command, loop.port), run_example(command, etcd_port)
        if "405" in theirs[0] and "/v3/" in command:
            ours[1].remove("Allow: POST")  # RFC 9110 demands it; etcd leaves it out.
        assert ours == theirs, command


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_documented_watch_prints_what_etcd_prints(loop: Loop, etcd_port: int) -> None:
    printed = []
    for port in (loop.port, etcd_port):
        with subprocess.Popen(
            [*curl(WATCH, port), "-s"], stdout=subprocess.PIPE, text=True
        ) as watch:
            assert watch.stdout is not None
            lines = [watch.stdout.readline()]
            for command in (
                'curl http://localhost:2379/v3/kv/put -d \'{"key":"Zm9v","value":"YmFy"}\'',
                'curl http://localhost:2379/v3/kv/deleterange -d \'{"key":"Zm9v"}\'',
            ):
                run_example(command, port)
                lines.append(watch.stdout.readline())
            watch.kill()
        printed.append([mask(line) for line in lines])
    assert printed[0] == printed[1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_uploads_and_downloads_large_values(loop: Loop, tmp_path: Path) -> None:
    value = b64(os.urandom(1_150_000))
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"key": FOO, "value": value}))
    for options in ("", "-H 'Transfer-Encoding: chunked'", "-0"):
        put = f"curl {options} http://localhost:2379/v3/kv/put --data-binary @{body}"
        assert run_example(put, loop.port)[0] == "200 OK"
    printed = run_example('curl http://localhost:2379/v3/kv/range -d \'{"key":"Zm9v"}\'', loop.port)
    assert json.loads(printed[2])["kvs"][0]["value"] == value
