"""etcdlite-ctl without a server: what it prints is etcdctl 3.5's, what it reads becomes messages.

The texts in `GOLDEN` are what etcdctl 3.5.1 printed for the same responses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.ctl_runner import run_ctl
from rigs.fake_server import IGNORE, FakeConnection, FakeServer
from rigs.processes import ROOT

from etcdlite import ctl, frames, proto
from etcdlite.backup import Status
from etcdlite.cli import check as ctl_check
from etcdlite.cli import commands as ctl_commands
from etcdlite.cli import flags as ctl_flags
from etcdlite.cli import help as ctl_help
from etcdlite.cli import locks as ctl_locks
from etcdlite.cli import output as ctl_output
from etcdlite.cli import session as ctl_session
from etcdlite.cli import table as ctl_table
from etcdlite.cli import watch as ctl_watch
from etcdlite.cli.failures import Failure
from etcdlite.cli.flags import Flag, parse_flags
from etcdlite.cli.output import EndpointResponse, Health, Printer
from etcdlite.cli.requests import parse_compare, parse_request
from etcdlite.client import ConnectionFailed, EtcdliteError, KeyNotFound, LeaseNotFound, Timeout
from etcdlite.client.errors import RequestTooManyRequests, Unhealthy
from etcdlite.methods import METHOD_BY_NAME
from etcdlite.notation import (
    format_duration,
    format_size,
    parse_duration_s,
    parse_int,
    quote,
    unquote,
)

HEADER = proto.ResponseHeader(
    cluster_id=12607863889349149623, member_id=7615239189561705077, revision=17, raft_term=2
)
JSON_HEADER = (
    '{"cluster_id":12607863889349149623,"member_id":7615239189561705077,"revision":17,'
    '"raft_term":2}'
)
FIELDS_HEADER = (
    '"ClusterID" : 12607863889349149623\n"MemberID" : 7615239189561705077\n'
    '"Revision" : 17\n"RaftTerm" : 2\n'
)
FLAT_HEADER = JSON_HEADER[1:-1]
INNER = proto.ResponseHeader(revision=17)
FIELDS_INNER = '"ClusterID" : 0\n"MemberID" : 0\n"Revision" : 17\n"RaftTerm" : 0\n'
KV = proto.KeyValue(
    key=b"foo", create_revision=8, mod_revision=16, version=6, value=b"bar", lease=255
)
JSON_KV = (
    '{"key":"Zm9v","create_revision":8,"mod_revision":16,"version":6,"value":"YmFy","lease":255}'
)


def fields_kv(prefix: str = "") -> str:
    return (
        f'"{prefix}Key" : "foo"\n"{prefix}CreateRevision" : 8\n"{prefix}ModRevision" : 16\n'
        f'"{prefix}Version" : 6\n"{prefix}Value" : "bar"\n"{prefix}Lease" : 255\n'
    )


TXN = proto.TxnResponse(
    header=HEADER,
    succeeded=True,
    responses=[
        proto.ResponseOp(response_put=proto.PutResponse(header=INNER, prev_kv=KV)),
        proto.ResponseOp(response_range=proto.RangeResponse(header=INNER, kvs=[KV], count=1)),
        proto.ResponseOp(response_delete_range=proto.DeleteRangeResponse(header=INNER)),
    ],
)
MEMBERS = proto.MemberListResponse(
    header=proto.ResponseHeader(cluster_id=0x9677AD8F4D1C19, member_id=0x6243B8478CC8223C),
    members=[
        proto.Member(
            ID=0x6243B8478CC8223C,
            name="default",
            peerURLs=["http://127.0.0.1:52631"],
            clientURLs=["http://127.0.0.1:43655"],
        ),
        proto.Member(ID=0x83AA488457F294CC, peerURLs=["http://127.0.0.1:9"], isLearner=True),
    ],
)
ALARM_TEXT = "memberID:14397101929647524157 alarm:NOSPACE "
STATUS = proto.StatusResponse(
    header=HEADER,
    version="3.5.1",
    dbSize=81920,
    leader=HEADER.member_id,
    raftIndex=10,
    raftTerm=2,
    raftAppliedIndex=10,
    dbSizeInUse=77824,
    errors=[ALARM_TEXT],
    storageVersion="3.6.0",
    dbSizeQuota=100000,
)
FOUND = [
    Health("127.0.0.1:52621", True, 1_923_081, ""),
    Health("127.0.0.1:1", False, 1_001_055_596, "context deadline exceeded"),
]
DELETE_EVENT = proto.Event(type=1, kv=proto.KeyValue(key=b"foo", mod_revision=17), prev_kv=KV)

GOLDEN: list[tuple[str, str, tuple[Any, ...], str]] = [
    ("simple", "put", (proto.PutResponse(header=HEADER),), "OK\n"),
    ("simple", "put", (proto.PutResponse(header=HEADER, prev_kv=KV),), "OK\nfoo\nbar\n"),
    ("json", "put", (proto.PutResponse(header=HEADER),), '{"header":' + JSON_HEADER + "}\n"),
    (
        "fields",
        "put",
        (proto.PutResponse(header=HEADER, prev_kv=KV),),
        FIELDS_HEADER + fields_kv("Prev"),
    ),
    (
        "json",
        "get",
        (proto.RangeResponse(header=HEADER, kvs=[KV], more=True, count=2),),
        '{"header":' + JSON_HEADER + ',"kvs":[' + JSON_KV + '],"more":true,"count":2}\n',
    ),
    (
        "fields",
        "get",
        (proto.RangeResponse(header=HEADER, kvs=[KV], count=1),),
        FIELDS_HEADER + fields_kv() + '"More" : false\n"Count" : 1\n',
    ),
    (
        "simple",
        "delete",
        (proto.DeleteRangeResponse(header=HEADER, deleted=1, prev_kvs=[KV]),),
        "1\nfoo\nbar\n",
    ),
    (
        "json",
        "delete",
        (proto.DeleteRangeResponse(header=HEADER, deleted=1, prev_kvs=[KV]),),
        '{"header":' + JSON_HEADER + ',"deleted":1,"prev_kvs":[' + JSON_KV + "]}\n",
    ),
    (
        "fields",
        "delete",
        (proto.DeleteRangeResponse(header=HEADER),),
        FIELDS_HEADER + '"Deleted" : 0\n',
    ),
    ("simple", "txn", (TXN,), "SUCCESS\n\nOK\nfoo\nbar\n\nfoo\nbar\n\n0\n"),
    ("simple", "txn", (proto.TxnResponse(header=HEADER),), "FAILURE\n"),
    (
        "json",
        "txn",
        (TXN,),
        '{"header":' + JSON_HEADER + ',"succeeded":true,"responses":['
        '{"Response":{"response_put":{"header":{"revision":17},"prev_kv":' + JSON_KV + "}}},"
        '{"Response":{"response_range":{"header":{"revision":17},"kvs":['
        + JSON_KV
        + '],"count":1}}},'
        '{"Response":{"response_delete_range":{"header":{"revision":17}}}}]}\n',
    ),
    (
        "fields",
        "txn",
        (TXN,),
        FIELDS_HEADER
        + '"Succeeded" : true\n'
        + FIELDS_INNER
        + fields_kv("Prev")
        + FIELDS_INNER
        + fields_kv()
        + '"More" : false\n"Count" : 1\n'
        + FIELDS_INNER
        + '"Deleted" : 0\n',
    ),
    (
        "simple",
        "watch",
        (proto.WatchResponse(header=HEADER, events=[proto.Event(kv=KV), DELETE_EVENT]),),
        "PUT\nfoo\nbar\nDELETE\nfoo\nbar\nfoo\n\n",
    ),
    (
        "json",
        "watch",
        (proto.WatchResponse(header=HEADER, events=[DELETE_EVENT]),),
        '{"Header":' + JSON_HEADER + ',"Events":[{"type":1,"kv":{"key":"Zm9v","mod_revision":17},'
        '"prev_kv":' + JSON_KV + '}],"CompactRevision":0,"Canceled":false,"Created":false}\n',
    ),
    (
        "fields",
        "watch",
        (proto.WatchResponse(header=HEADER, events=[proto.Event(kv=KV, prev_kv=KV)]),),
        FIELDS_HEADER + '"Type" : PUT\n' + fields_kv("Prev") + fields_kv(),
    ),
    (
        "simple",
        "lease_grant",
        (proto.LeaseGrantResponse(ID=0x275A1FB790D3C27, TTL=100),),
        "lease 0275a1fb790d3c27 granted with TTL(100s)\n",
    ),
    (
        "json",
        "lease_grant",
        (proto.LeaseGrantResponse(header=HEADER, ID=177225861790776407, TTL=100),),
        "{" + FLAT_HEADER + ',"ID":177225861790776407,"TTL":100,"Error":""}\n',
    ),
    (
        "fields",
        "lease_grant",
        (proto.LeaseGrantResponse(header=HEADER, ID=7, TTL=100),),
        FIELDS_HEADER + '"ID" : 7\n"TTL" : 100\n',
    ),
    (
        "simple",
        "lease_revoke",
        (proto.LeaseRevokeResponse(), 10),
        "lease 000000000000000a revoked\n",
    ),
    (
        "simple",
        "lease_time_to_live",
        (proto.LeaseTimeToLiveResponse(ID=10, TTL=-1), False),
        "lease 000000000000000a already expired\n",
    ),
    (
        "simple",
        "lease_time_to_live",
        (proto.LeaseTimeToLiveResponse(ID=10, TTL=199, grantedTTL=200, keys=[b"a", b"b"]), True),
        "lease 000000000000000a granted with TTL(200s), remaining(199s), attached keys([a b])\n",
    ),
    (
        "json",
        "lease_time_to_live",
        (proto.LeaseTimeToLiveResponse(header=HEADER, ID=10, TTL=-1), True),
        "{" + FLAT_HEADER + ',"id":10,"ttl":-1,"granted-ttl":0,"keys":null}\n',
    ),
    (
        "fields",
        "lease_time_to_live",
        (proto.LeaseTimeToLiveResponse(header=HEADER, ID=10, TTL=5, keys=[b"a"]), True),
        FIELDS_HEADER + '"ID" : 10\n"TTL" : 5\n"GrantedTTL" : 0\n"Key" : "a"\n',
    ),
    ("simple", "lease_list", (proto.LeaseLeasesResponse(),), "found 0 leases\n"),
    (
        "json",
        "lease_list",
        (proto.LeaseLeasesResponse(header=HEADER, leases=[proto.LeaseStatus(ID=7)]),),
        "{" + FLAT_HEADER + ',"leases":[{"id":7}]}\n',
    ),
    (
        "json",
        "lease_list",
        (proto.LeaseLeasesResponse(header=HEADER),),
        "{" + FLAT_HEADER + ',"leases":[]}\n',
    ),
    (
        "simple",
        "lease_keep_alive",
        (proto.LeaseKeepAliveResponse(ID=10, TTL=3),),
        "lease 000000000000000a keepalived with TTL(3)\n",
    ),
    (
        "simple",
        "alarm",
        (proto.AlarmResponse(alarms=[proto.AlarmMember(memberID=14397101929647524157, alarm=1)]),),
        ALARM_TEXT + "\n",
    ),
    (
        "json",
        "alarm",
        (proto.AlarmResponse(alarms=[proto.AlarmMember(memberID=14397101929647524157, alarm=1)]),),
        '{"alarms":[{"memberID":14397101929647524157,"alarm":1}]}\n',
    ),
    ("json", "alarm", (proto.AlarmResponse(),), "{}\n"),
    (
        "fields",
        "alarm",
        (proto.AlarmResponse(header=HEADER, alarms=[proto.AlarmMember(memberID=5, alarm=1)]),),
        FIELDS_HEADER + '"MemberID" : 5\n"AlarmType" : NOSPACE\n\n',
    ),
    (
        "simple",
        "member_list",
        (MEMBERS,),
        "6243b8478cc8223c, started, default, http://127.0.0.1:52631, "
        "http://127.0.0.1:43655, false\n"
        "83aa488457f294cc, unstarted, , http://127.0.0.1:9, , true\n",
    ),
    (
        "json",
        "member_list",
        (MEMBERS,),
        '{"header":{"cluster_id":42352833823841305,"member_id":7080705656600666684},"members":['
        '{"ID":7080705656600666684,"name":"default","peerURLs":["http://127.0.0.1:52631"],'
        '"clientURLs":["http://127.0.0.1:43655"]},'
        '{"ID":9487475298257769676,"peerURLs":["http://127.0.0.1:9"],"isLearner":true}]}\n',
    ),
    (
        "table",
        "member_list",
        (MEMBERS,),
        "+------------------+-----------+---------+------------------------+"
        "------------------------+------------+\n"
        "|        ID        |  STATUS   |  NAME   |       PEER ADDRS       |"
        "      CLIENT ADDRS      | IS LEARNER |\n"
        "+------------------+-----------+---------+------------------------+"
        "------------------------+------------+\n"
        "| 6243b8478cc8223c |   started | default | http://127.0.0.1:52631 |"
        " http://127.0.0.1:43655 |      false |\n"
        "| 83aa488457f294cc | unstarted |         |     http://127.0.0.1:9 |"
        "                        |       true |\n"
        "+------------------+-----------+---------+------------------------+"
        "------------------------+------------+\n",
    ),
    (
        "simple",
        "endpoint_status",
        ([EndpointResponse("127.0.0.1:36501", STATUS)],),
        f"127.0.0.1:36501, 69aec3b215758275, 3.5.1, 82 kB, true, false, 2, 10, 10, {ALARM_TEXT}\n",
    ),
    (
        "json",
        "endpoint_status",
        ([EndpointResponse("127.0.0.1:36501", STATUS)],),
        '[{"Endpoint":"127.0.0.1:36501","Status":{"header":' + JSON_HEADER + ',"version":"3.5.1",'
        '"dbSize":81920,"leader":7615239189561705077,"raftIndex":10,"raftTerm":2,'
        f'"raftAppliedIndex":10,"errors":["{ALARM_TEXT}"],"dbSizeInUse":77824}}}}]\n',
    ),
    (
        "fields",
        "endpoint_status",
        ([EndpointResponse("127.0.0.1:36501", STATUS)],),
        FIELDS_HEADER + '"Version" : "3.5.1"\n"DBSize" : 81920\n"Leader" : 7615239189561705077\n'
        '"IsLearner" : false\n"RaftIndex" : 10\n"RaftTerm" : 2\n"RaftAppliedIndex" : 10\n'
        f'"Errors" : [{ALARM_TEXT}]\n"Endpoint" : "127.0.0.1:36501"\n\n',
    ),
    (
        "table",
        "endpoint_status",
        ([EndpointResponse("127.0.0.1:36501", STATUS)],),
        "+-----------------+------------------+---------+---------+-----------+------------+"
        "-----------+------------+--------------------+--------------------------------+\n"
        "|    ENDPOINT     |        ID        | VERSION | DB SIZE | IS LEADER | IS LEARNER |"
        " RAFT TERM | RAFT INDEX | RAFT APPLIED INDEX |             ERRORS             |\n"
        "+-----------------+------------------+---------+---------+-----------+------------+"
        "-----------+------------+--------------------+--------------------------------+\n"
        "| 127.0.0.1:36501 | 69aec3b215758275 |   3.5.1 |   82 kB |      true |      false |"
        "         2 |         10 |                 10 |  memberID:14397101929647524157 |\n"
        "|                 |                  |         |         |           |            |"
        "           |            |                    |                 alarm:NOSPACE  |\n"
        "+-----------------+------------------+---------+---------+-----------+------------+"
        "-----------+------------+--------------------+--------------------------------+\n",
    ),
    (
        "simple",
        "endpoint_health",
        (FOUND,),
        "127.0.0.1:52621 is healthy: successfully committed proposal: took = 1.923081ms\n",
    ),
    (
        "json",
        "endpoint_health",
        (FOUND,),
        '[{"endpoint":"127.0.0.1:52621","health":true,"took":"1.923081ms"},'
        '{"endpoint":"127.0.0.1:1","health":false,"took":"1.001055596s",'
        '"error":"context deadline exceeded"}]\n',
    ),
    (
        "fields",
        "endpoint_health",
        (FOUND,),
        '"Endpoint" : "127.0.0.1:52621"\n"Health" : true\n"Took" : 1.923081ms\n"Error" : \n\n'
        '"Endpoint" : "127.0.0.1:1"\n"Health" : false\n"Took" : 1.001055596s\n'
        '"Error" : context deadline exceeded\n\n',
    ),
    (
        "table",
        "endpoint_health",
        (FOUND,),
        "+-----------------+--------+--------------+---------------------------+\n"
        "|    ENDPOINT     | HEALTH |     TOOK     |           ERROR           |\n"
        "+-----------------+--------+--------------+---------------------------+\n"
        "| 127.0.0.1:52621 |   true |   1.923081ms |                           |\n"
        "|     127.0.0.1:1 |  false | 1.001055596s | context deadline exceeded |\n"
        "+-----------------+--------+--------------+---------------------------+\n",
    ),
    (
        "json",
        "endpoint_hashkv",
        ([EndpointResponse("a:1", proto.HashKVResponse(hash=7, compact_revision=-1))],),
        '[{"Endpoint":"a:1","HashKV":{"hash":7,"compact_revision":-1}}]\n',
    ),
    ("json", "endpoint_hashkv", ([],), "[]\n"),
    (
        "table",
        "snapshot_status",
        (Status(0x88EE92E9, 57, 71, 24576),),
        "+----------+----------+------------+------------+\n"
        "|   HASH   | REVISION | TOTAL KEYS | TOTAL SIZE |\n"
        "+----------+----------+------------+------------+\n"
        "| 88ee92e9 |       57 |         71 |      25 kB |\n"
        "+----------+----------+------------+------------+\n",
    ),
    (
        "simple",
        "snapshot_status",
        (Status(0xC0F74EDC, 15, 23, 20480),),
        "c0f74edc, 15, 23, 20 kB\n",
    ),
    (
        "json",
        "snapshot_status",
        (Status(3555895242, 29, 39, 24576),),
        '{"hash":3555895242,"revision":29,"totalKey":39,"totalSize":24576}\n',
    ),
    (
        "fields",
        "snapshot_status",
        (Status(4213253264, 43, 55, 24576),),
        '"Hash" : 4213253264\n"Revision" : 43\n"Keys" : 55\n"Size" : 24576\n',
    ),
]


@pytest.mark.parametrize(
    ("name", "kind", "arguments", "text"),
    GOLDEN,
    ids=[f"{number}-{name}-{kind}" for number, (name, kind, _, _) in enumerate(GOLDEN)],
)
def test_a_response_is_printed_as_etcdctl_prints_it(
    name: str, kind: str, arguments: tuple[Any, ...], text: str
) -> None:
    assert Printer(name).show(kind, *arguments).decode() == text


def test_hex_shows_every_byte() -> None:
    kv = proto.KeyValue(key=b"foo", value=b"hex\x01\xc3\xbf")
    shown = Printer("simple", hex_strings=True).show("get", proto.RangeResponse(kvs=[kv]))
    assert shown == b"\\x66\\x6f\\x6f\n\\x68\\x65\\x78\\x01\\xc3\\xbf\n"


def test_hex_in_json_changes_only_the_member_list_as_in_etcdctl() -> None:
    assert Printer("json", hex_strings=True).show("member_list", MEMBERS).decode() == (
        '{"header":{"cluster_id":"9677ad8f4d1c19","member_id":"6243b8478cc8223c","raft_term":0},'
        '"members":[{"ID":"6243b8478cc8223c","name":"default",'
        '"peerURLs":["http://127.0.0.1:52631"],"clientURLS":["http://127.0.0.1:43655"]},'
        '{"ID":"83aa488457f294cc","name":"","peerURLs":["http://127.0.0.1:9"],'
        '"clientURLS":null}]}\n'
    )
    shown = Printer("json", hex_strings=True).show("get", proto.RangeResponse(kvs=[KV]))
    assert shown.decode() == '{"kvs":[' + JSON_KV + "]}\n"


@pytest.mark.parametrize("format", ["simple", "table", "fields", "json"])
def test_the_names_that_a_server_sends_do_not_control_the_terminal(format: str) -> None:
    hostile = "a\x1b[2J\n\u202eb"
    member = proto.Member(ID=1, name=hostile, peerURLs=[hostile], clientURLs=[hostile])
    shown = Printer(format).show("member_list", proto.MemberListResponse(members=[member]))
    lines = shown.decode().removesuffix("\n").split("\n")
    assert all(line.isprintable() or format == "json" for line in lines), lines
    assert "\x1b" not in shown.decode()
    if format == "table":
        assert len(set(map(len, lines))) == 1, "the columns are not aligned"


def test_values_that_this_version_does_not_know_are_shown_as_numbers() -> None:
    event = proto.Event(type=77, kv=proto.KeyValue(key=b"k"))
    events = proto.WatchResponse(events=[event])
    assert Printer("simple").show("watch", events).startswith(b"77\n")
    assert b'"Type" : 77\n' in Printer("fields").show("watch", events)
    role = proto.AuthRoleGetResponse(perm=[proto.Permission(permType=77, key=b"k")])
    assert b'"PermType" :  77\n' in Printer("fields").show("role_get", role, "r")


def test_metrics_that_are_not_http_are_one_line() -> None:
    with FakeServer() as server:
        ended = run_ctl("--endpoints", server.endpoint, "check", "datascale")
        assert ended.status == 1, ended
        assert ended.stderr.endswith("/metrics: the answer is not HTTP\n")
        assert ended.stderr.count("\n") == 1
        server.intercept = answer_status
        seen = run_ctl("--endpoints", server.endpoint, "top", "--count", "1")
    assert seen.status == 0, seen


def answer_status(_: FakeConnection, request_id: int, name: str, __: Any) -> bytes | None:
    if name != "Maintenance.Status":
        return None
    status = proto.StatusResponse(header=HEADER)
    number = METHOD_BY_NAME[name].number
    return frames.frame(request_id, number, frames.END, status.encode())


def test_protobuf_output_is_the_encoded_response() -> None:
    response = proto.RangeResponse(header=HEADER, kvs=[KV], count=1)
    assert proto.RangeResponse.decode(Printer("protobuf").show("get", response)) == response


@pytest.mark.parametrize(
    ("data", "quoted"),
    [
        (b"foo", '"foo"'),
        ('q"u\\o\te\x7f€\u200b'.encode(), r'"q\"u\\o\te\x7f€\u200b"'),
        ("v\n\r\v\f\a\b\x1b\u00ad😀\u2028".encode(), r'"v\n\r\v\f\a\b\x1b\u00ad😀\u2028"'),
        (b"\xff\xfe\xc3\x28\xed\xa0\x80 ", r'"\xff\xfe\xc3(\xed\xa0\x80 "'),
        ("\U000e0001".encode(), r'"\U000e0001"'),
    ],
)
def test_bytes_are_quoted_as_go_quotes_them(data: bytes, quoted: str) -> None:
    assert quote(data) == quoted


@given(st.binary())
def test_what_is_quoted_is_read_back(data: bytes) -> None:
    assert unquote(quote(data)[1:-1]) == data


def test_json_strings_are_escaped_as_go_escapes_them() -> None:
    assert ctl_output.go_json('a"\\\n\x01<>&\u2028é') == (
        r'"a\"\\\n\u0001\u003c\u003e\u0026\u2028é"'
    )


@pytest.mark.parametrize(
    ("duration_ns", "text"),
    [
        (0, "0s"),
        (12, "12ns"),
        (582_400, "582.4µs"),
        (1_726_341, "1.726341ms"),
        (1_000_370_075, "1.000370075s"),
        (60_250_000_000, "1m0.25s"),
        (3_723_000_000_000, "1h2m3s"),
    ],
)
def test_durations_look_like_gos(duration_ns: int, text: str) -> None:
    assert format_duration(duration_ns) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (9, "9 B"), (227, "227 B"), (1568, "1.6 kB"), (20480, "20 kB"), (999, "999 B")]
    + [(1_500_000, "1.5 MB"), (81_920, "82 kB"), (2_147_483_648, "2.1 GB")],
)
def test_sizes_are_in_powers_of_a_thousand(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


# Flags.


def test_flags_may_stand_anywhere_and_take_their_value_in_every_way() -> None:
    flags = (*ctl_flags.GLOBAL_FLAGS, *ctl_table.GET_FLAGS)
    words = [
        "--limit",
        "0x10",
        "a",
        "-w=json",
        "--prefix",
        "b",
        "--rev=-1",
        "--hex=false",
        "--",
        "-c",
    ]
    arguments, before_dashes, values = parse_flags(words, flags)
    assert arguments == ["a", "b", "-c"]
    assert before_dashes == 2
    assert values == {"limit": 16, "write-out": "json", "prefix": True, "rev": -1, "hex": False}
    assert parse_flags(["-wjson", "-ih"], (*flags, Flag("interactive", "bool", False, "", "i")))[
        2
    ] == {
        "write-out": "json",
        "interactive": True,
        "help": True,
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--bogus"], "unknown flag: --bogus"),
        (["--pref"], "unknown flag: --pref (did you mean --prefix?)"),
        (["--cert-file", "x"], "unknown flag: --cert-file (did you mean --cert?)"),
        (["--ca-file=x"], "unknown flag: --ca-file (did you mean --cacert?)"),
        (["--peers=x"], "unknown flag: --peers (did you mean --endpoints?)"),
        (["-x"], "unknown shorthand flag: 'x' in -x (if -x is an argument, write -- before it)"),
        (["-w"], "flag needs an argument: 'w' in -w"),
        (["--limit"], "flag needs an argument: --limit"),
        (
            ["--limit=x"],
            'invalid argument "x" for "--limit" flag: strconv.ParseInt: parsing "x": invalid '
            "syntax",
        ),
        (
            ["--limit=9999999999999999999"],
            'invalid argument "9999999999999999999" for "--limit" flag: strconv.ParseInt: '
            'parsing "9999999999999999999": value out of range',
        ),
        (
            ["--prefix=x"],
            'invalid argument "x" for "--prefix" flag: strconv.ParseBool: parsing "x": invalid '
            "syntax",
        ),
        (
            ["--command-timeout", "5"],
            'invalid argument "5" for "--command-timeout" flag: time: missing unit in duration "5"',
        ),
        (
            ["--command-timeout", "5sx"],
            'invalid argument "5sx" for "--command-timeout" flag: time: unknown unit "sx" in '
            'duration "5sx"',
        ),
    ],
)
def test_a_bad_flag_is_named_with_the_cause(words: list[str], text: str) -> None:
    ended = run_ctl("get", "a", *words)
    assert ended == (1, b"", f"Error: {text}; see etcdlite-ctl get --help\n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300ms", 0.3),
        ("1m30s", 90.0),
        (".5s", 0.5),
        ("1h2m3.5s", 3723.5),
        ("0", 0.0),
        ("-1s", -1.0),
        ("2562047h47m16s", 9223372036.0),
    ],
)
def test_durations_are_read_as_go_reads_them(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["2562048h", "-2562048h", "9" * 400 + "h"])
def test_what_go_would_not_read_is_no_duration(text: str) -> None:
    """Go has 64 bits for the nanoseconds. What is longer would be infinite, or no time at all."""
    with pytest.raises(ValueError, match="time: invalid duration"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "base", "number"),
    [
        ("10", 10, 10),
        ("+7", 10, 7),
        ("010", 0, 8),
        ("1_000", 0, 1000),
        ("ff", 16, 255),
        ("-1", 16, -1),
    ],
)
def test_integers_are_read_as_go_reads_them(text: str, base: int, number: int) -> None:
    assert parse_int(text, base) == number


@pytest.mark.parametrize("text", ["", " 1", "1 ", "--1", "0x1", "1_0", "é", "१"])
def test_what_go_would_not_read_is_no_integer(text: str) -> None:
    with pytest.raises(ValueError, match="invalid syntax"):
        parse_int(text)


# A client that keeps what it is asked, and answers from a table.


class FakeClient:
    """In place of client.Client: `answers` maps a method to a response, an error or a function."""

    calls: list[tuple[str, Any]]
    answers: dict[str, Any]
    made: list[FakeClient]

    certificate_ends_s = None

    def __init__(
        self, endpoints: list[str], timeout_s: float, dial_timeout_s: float, **tls: Any
    ) -> None:
        self.tls = tls
        self.endpoint = endpoints[0]
        self.endpoints = endpoints
        self.timeout_s = timeout_s
        self.dial_timeout_s = dial_timeout_s
        self.made.append(self)

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def call(self, method: str, request: Any) -> Any:
        self.calls.append((method, request))
        answer = self.answers[method]
        if callable(answer):
            answer = answer(request, self.endpoint)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(FakeClient, "calls", [], raising=False)
    monkeypatch.setattr(FakeClient, "answers", {}, raising=False)
    monkeypatch.setattr(FakeClient, "made", [], raising=False)
    monkeypatch.setattr(ctl_session, "Client", FakeClient)
    return FakeClient


# Commands and their requests.


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (["a"], {"key": b"a"}),
        (["a", "b"], {"key": b"a", "range_end": b"b"}),
        (["a", "--prefix"], {"key": b"a", "range_end": b"b"}),
        (["", "--prefix"], {"key": b"\0", "range_end": b"\0"}),
        (["a", "--from-key"], {"key": b"a", "range_end": b"\0"}),
        (["", "--from-key"], {"key": b"\0", "range_end": b"\0"}),
        (["\udcff", "--prefix"], {"key": b"\xff", "range_end": b"\0"}),
        (["a", "--limit", "5", "--rev=7"], {"key": b"a", "limit": 5, "revision": 7}),
        (["a", "--sort-by", "modify"], {"key": b"a", "sort_target": 3}),
        (
            ["a", "--sort-by=VALUE", "--order=descend"],
            {"key": b"a", "sort_target": 4, "sort_order": 2},
        ),
        (
            ["a", "--consistency=s", "--keys-only"],
            {"key": b"a", "serializable": True, "keys_only": True},
        ),
    ],
)
def test_get_asks_for_what_the_arguments_say(
    fake: type[FakeClient], words: list[str], request_: dict[str, Any]
) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(header=HEADER, kvs=[KV], count=1)
    assert run_ctl("get", *words) == (0, b"foo\nbar\n", "")
    assert fake.calls == [("KV.Range", proto.RangeRequest(**request_))]


def test_put_takes_the_value_from_standard_input(fake: type[FakeClient]) -> None:
    fake.answers["KV.Put"] = proto.PutResponse(header=HEADER)
    assert run_ctl("put", "k", stdin=b"line\nline\n\xff") == (0, b"OK\n", "")
    assert run_ctl("put", "k", "--", "-v") == (0, b"OK\n", "")
    assert run_ctl("put", "k", "v", "--lease", "ff", "--prev-kv").status == 0
    assert run_ctl("put", "k", "--ignore-value").status == 0
    assert fake.calls == [
        ("KV.Put", proto.PutRequest(key=b"k", value=b"line\nline\n\xff")),
        ("KV.Put", proto.PutRequest(key=b"k", value=b"-v")),
        ("KV.Put", proto.PutRequest(key=b"k", value=b"v", lease=255, prev_kv=True)),
        ("KV.Put", proto.PutRequest(key=b"k", ignore_value=True)),
    ]


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("put", 128, "put command needs 1 argument and input from stdin or 2 arguments"),
        ("put k", 128, "put command needs 1 argument and input from stdin or 2 arguments"),
        (
            "put k v --ignore-value",
            128,
            "put command needs only 1 argument when 'ignore-value' is set",
        ),
        (
            "put k v --lease zz",
            128,
            'bad lease ID (strconv.ParseInt: parsing "zz": invalid syntax), expecting ID in Hex',
        ),
        (
            "get",
            128,
            "get command needs one argument as key and an optional argument as range_end",
        ),
        (
            "get a --prefix --from-key",
            128,
            "`--prefix` and `--from-key` cannot be set at the same time, choose one",
        ),
        (
            "get a b --prefix",
            128,
            "too many arguments, only accept one argument when `--prefix` or `--from-key` is set",
        ),
        ("get a --order x", 4, "bad sort order x"),
        ("get a --sort-by x", 4, "bad sort target x"),
        ("get a --consistency x", 4, 'unknown consistency flag "x"'),
        (
            "get a --print-value-only -w json",
            128,
            "print-value-only is only for `--write-out=simple`",
        ),
        ("get a --count-only", 128, "--count-only is only for `--write-out=fields`"),
        (
            "get a --keys-only --count-only",
            128,
            "`--keys-only` and `--count-only` cannot be set at the same time, choose one",
        ),
        (
            "get a -w bogus",
            4,
            "unsupported output format bogus (known: fields, json, protobuf, simple, table)",
        ),
        ("get a -w table", 4, "table not supported as output format of get"),
        (
            "del a b c",
            128,
            "del command needs one argument as key and an optional argument as range_end",
        ),
        ("txn x", 128, "txn command does not accept argument"),
        ("watch", 128, "bad number of arguments"),
        ("watch a b --prefix", 128, "`range_end` and `--prefix` are mutually exclusive"),
        ("compaction", 128, "compaction command needs 1 argument"),
        ("compaction x", 1, 'strconv.ParseInt: parsing "x": invalid syntax'),
        ("lease grant", 128, "lease grant command needs TTL argument"),
        ("lease grant x", 128, 'bad TTL (strconv.ParseInt: parsing "x": invalid syntax)'),
        ("lease revoke", 128, "lease revoke command needs 1 argument"),
        ("lease timetolive", 128, "lease timetolive command needs lease ID as argument"),
        (
            "lease keep-alive zz",
            128,
            'bad lease ID arg (strconv.ParseInt: parsing "zz": invalid syntax), '
            "expecting ID in Hex",
        ),
        ("alarm list x", 128, "alarm list command accepts no arguments"),
        ("lock", 128, "lock takes a lock name argument and an optional command to execute"),
        ("elect", 128, "elect takes one election name argument and an optional proposal argument"),
        ("elect e", 128, "no proposal argument but -l not set"),
        ("elect -l e p", 128, "proposal given but -l is set"),
        ("snapshot save", 128, "snapshot save expects one argument"),
        (
            "snapshot save f --endpoints a:1,b:2",
            5,
            "snapshot must be requested to one selected node, not multiple [a:1 b:2]",
        ),
        ("snapshot status", 128, "snapshot status requires exactly one argument"),
        ("snapshot restore", 128, "snapshot restore requires exactly one argument"),
        ("check perf --load q", 4, "unknown load option q"),
        ("completion", 128, "completion needs the name of the shell: bash, fish or zsh"),
        ("bogus", 1, 'unknown command "bogus" for "etcdlite-ctl" (see etcdlite-ctl --help)'),
        ("set a b", 1, 'unknown command "set" for "etcdlite-ctl" (did you mean put?)'),
        ("pit a b", 1, 'unknown command "pit" for "etcdlite-ctl" (did you mean put?)'),
        ("delete a", 1, 'unknown command "delete" for "etcdlite-ctl" (did you mean del?)'),
        (
            "health",
            1,
            'unknown command "health" for "etcdlite-ctl" (did you mean endpoint health?)',
        ),
        (
            "cluster-health",
            1,
            'unknown command "cluster-health" for "etcdlite-ctl" '
            "(did you mean endpoint health --cluster?)",
        ),
        ("comp 5", 1, 'unknown command "comp" for "etcdlite-ctl" (see etcdlite-ctl --help)'),
        (
            "lease grand 5",
            1,
            'unknown command "lease grand" for "etcdlite-ctl" (did you mean lease grant?)',
        ),
        ("make-mirror", 128, "make-mirror takes one destination argument"),
        ("move-leader", 128, "move-leader command needs 1 argument"),
        ("downgrade validate", 128, "TARGET_VERSION not provided"),
        ("downgrade enable 0.1 0.2", 128, "too many arguments"),
        ("member add", 128, "member name not provided"),
        ("member add x", 128, "member peer urls not provided"),
        ("member add x y --peer-urls=http://a:1", 128, "too many arguments"),
        (
            "member add x http://a:1",
            128,
            "too many arguments, did you mean --peer-urls=http://a:1",
        ),
        ("member remove", 128, "member ID is not provided"),
        ("member update 12", 128, "member peer urls not provided"),
        ("member promote", 128, "member ID is not provided"),
        (
            "get a --cacert ca.pem",
            128,
            "cacert: cannot read ca.pem: No such file or directory",
        ),
        (
            "get a --insecure-transport=false --endpoints http://a",
            128,
            "--insecure-transport=false does not allow http://a: write https://",
        ),
        ("get a --endpoints=", 128, "--endpoints names no endpoint"),
        (
            "get a --command-timeout 0s",
            1,
            "context deadline exceeded (--command-timeout is not above 0)",
        ),
        ("defrag --data-dir x", 1, "x holds no member; give its --data-dir"),
        ("defrag --wal-dir x", 128, "--wal-dir is only for --data-dir"),
        (
            "defrag --data-dir x --cluster",
            128,
            "--cluster is for running members, not for --data-dir",
        ),
        (
            "snapshot restore x --into-cluster --data-dir y",
            128,
            "--data-dir is for a new data directory, not for --into-cluster",
        ),
        ("history a -w table", 4, "table not supported as output format of history"),
        ("diff -w fields", 4, "fields not supported as output format of diff"),
        (
            "snapshot restore x --into-cluster --dry-run -w table",
            4,
            "table not supported as output format of --dry-run",
        ),
        ("hashkv", 128, "hashkv requires exactly one argument"),
        ("hashkv x --rev -1", 128, "--rev must not be negative"),
        ("member list --consistency x", 4, 'unknown consistency flag "x"'),
        (
            "migrate",
            4,
            "etcdlite-ctl has no command migrate: a data directory has the format of the cluster "
            "version, which 'downgrade' lowers",
        ),
    ],
)
def test_wrong_arguments_are_one_line_and_etcdctls_status(
    line: str, status: int, text: str
) -> None:
    assert run_ctl(*line.split()) == (status, b"", f"Error: {text}\n")


def test_a_command_is_found_wherever_the_flags_stand(fake: type[FakeClient]) -> None:
    fake.answers["Lease.LeaseLeases"] = proto.LeaseLeasesResponse()
    for line in ("-w simple lease list", "lease -w simple list", "lease list -w simple"):
        assert run_ctl(*line.split()) == (0, b"found 0 leases\n", "")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("ge foo", "get"),
        ("pu foo bar", "put"),
        ("compact 5", "compaction"),
        ("mem list", "member list"),
        ("mem li", "member list"),
        ("endpoint stat", "endpoint status"),
        ("-w json e st --cluster", None),
        ("en st", "endpoint status"),
        ("lease keep 1f", "lease keep-alive"),
        ("mov 1f", "move-leader"),
        ("m list", None),
        ("a list", None),
        ("check p", "check perf"),
        ("snap s f", None),
        ("help mem", "member"),
        ("h mem li", "member list"),
    ],
)
def test_a_unique_prefix_of_a_name_is_enough(words: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(Failure, match="unknown command"):
            ctl.find_command(words.split())
        return
    found, _ = ctl.find_command(words.split())
    assert (found if isinstance(found, str) or found is None else found.name) == name


def test_an_empty_variable_counts_as_unset(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV])
    environ = {"ETCDLITE_CTL_ENDPOINTS": "", "ETCDCTL_ENDPOINTS": "etcdctl:1", "ETCDCTL_HEX": ""}
    assert run_ctl("get", "foo", environ=environ) == (0, b"foo\nbar\n", "")
    assert fake.made[-1].endpoints == ["etcdctl:1"]


def test_an_unknown_variable_is_reported(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV])
    ended = run_ctl("get", "foo", environ={"ETCDLITE_CTL_ENDPOINT": "other:1"})
    assert (ended.status, ended.stdout) == (128, b"") and not fake.made
    assert ended.stderr == (
        "Error: unknown variable ETCDLITE_CTL_ENDPOINT in the environment "
        "(did you mean ETCDLITE_CTL_ENDPOINTS?); correct or unset it\n"
    )
    ended = run_ctl("get", "foo", environ={"ETCDCTL_CA_FILE": "x", "ETCDCTL_WATCH_KEY": "y"})
    assert (ended.status, ended.stdout) == (0, b"foo\nbar\n")
    assert ended.stderr.startswith("Warning: unknown variable ETCDCTL_CA_FILE in the environment")
    assert ended.stderr.endswith("; it is ignored\n") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "variable, hint",
    [
        ("ETCDCTL_ENDPOINT", " (did you mean ETCDCTL_ENDPOINTS?)"),
        ("ETCDCTL_WRITEOUT", " (did you mean ETCDCTL_WRITE_OUT?)"),
        ("ETCDCTL_LIMIT", ""),
        ("ETCDCTL_PREFIX", ""),
        ("ETCDCTL_STRICT_RECONFIG_CHECK", ""),
        # Of etcdctl for API v2, and of etcd.
        ("ETCDCTL_PEERS", " (did you mean ETCDCTL_ENDPOINTS?)"),
        ("ETCDCTL_CA_FILE", " (did you mean ETCDCTL_CACERT?)"),
        ("ETCDCTL_TRUSTED_CA_FILE", " (did you mean ETCDCTL_CACERT?)"),
        ("ETCDCTL_CERT_FILE", " (did you mean ETCDCTL_CERT?)"),
        ("ETCDCTL_KEY_FILE", " (did you mean ETCDCTL_KEY?)"),
    ],
)
def test_only_a_variable_with_a_similar_name_is_suggested(
    fake: type[FakeClient], variable: str, hint: str
) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV])
    ended = run_ctl("get", "foo", environ={variable: "x"})
    assert ended.stderr == (
        f"Warning: unknown variable {variable} in the environment{hint}; it is ignored\n"
    )


@pytest.mark.parametrize("prefix", ["ETCDCTL_", "ETCDLITE_CTL_"])
def test_another_api_than_3_is_refused(fake: type[FakeClient], prefix: str) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV])
    assert run_ctl("get", "foo", environ={prefix + "API": "3"}) == (0, b"foo\nbar\n", "")
    ended = run_ctl("get", "foo", environ={prefix + "API": "2"})
    assert (ended.status, ended.stdout) == (128, b"")
    assert ended.stderr.startswith(f"Error: {prefix}API=2: only etcd's API 3 is here")


def test_member_add_of_a_second_voter_says_that_writes_wait(fake: type[FakeClient]) -> None:
    first, second = (proto.Member(ID=number, peerURLs=[f"http://m{number}"]) for number in (1, 2))
    learner = proto.Member(ID=2, peerURLs=["http://m2"], isLearner=True)
    third = proto.Member(ID=3, peerURLs=["http://m3"])
    for members, words, is_told in (
        ([first, second], (), True),
        ([first, learner], ("--learner",), False),
        ([first, second, third], (), False),
    ):
        answer = proto.MemberAddResponse(header=HEADER, member=members[-1], members=members)
        fake.answers["Cluster.MemberAdd"] = answer
        ended = run_ctl("member", "add", "x", "--peer-urls=http://new", *words)
        assert ended.status == 0
        assert ended.stderr.startswith("Nothing can be written until") == is_told, words


@pytest.mark.parametrize("second", [{"compact_revision": 4}, {"hash_revision": 9}, {}])
def test_hashes_that_cannot_be_compared_are_warned_of(
    fake: type[FakeClient], second: dict[str, int]
) -> None:
    same = {"hash": 1, "compact_revision": 5, "hash_revision": 8}

    def answer(request: Any, endpoint: str) -> Any:
        return proto.HashKVResponse(header=HEADER, **(same | (second if "b:1" in endpoint else {})))

    fake.answers["Maintenance.HashKV"] = answer
    ended = run_ctl("endpoint", "hashkv", "--endpoints=a:1,b:1")
    assert (ended.status, "cannot be compared" in ended.stderr) == (0, bool(second)), ended


def test_work_that_takes_long_on_a_large_store_is_waited_for(fake: type[FakeClient]) -> None:
    fake.answers["Maintenance.Defragment"] = proto.DefragmentResponse(header=HEADER)
    for words, timeout_s in (((), 600.0), (("--command-timeout=3s",), 3.0)):
        assert run_ctl("defrag", *words).status == 0
        assert fake.made[-1].timeout_s == timeout_s
    assert run_ctl("defrag", "--help").stdout.count(b"--command-timeout=") == 1


def test_a_cluster_without_a_quorum_does_not_hold_up_work_that_takes_long(
    fake: type[FakeClient],
) -> None:
    """Until the timeout, the client asks again for the list of all members."""
    listed = proto.MemberListResponse(members=[proto.Member(ID=1, clientURLs=["http://m1"])])
    times_s = []

    def members(request: Any, endpoint: str) -> Any:
        if not request.linearizable:
            return listed
        times_s.append(fake.made[-1].timeout_s)
        return Timeout(text="no quorum")

    fake.answers["Cluster.MemberList"] = members
    fake.answers["Maintenance.Defragment"] = proto.DefragmentResponse(header=HEADER)
    for words in ((), ("--command-timeout=3s",)):
        assert run_ctl("defrag", "--cluster", *words).status == 0
    assert times_s == [5.0, 3.0]


def test_a_change_after_which_members_have_http_and_https_is_warned_of(
    fake: type[FakeClient],
) -> None:
    mixed = [proto.Member(ID=1, peerURLs=["https://m1"]), proto.Member(ID=2, peerURLs=["http://m"])]
    for words, method in (
        (["add", "x", "--learner", "--peer-urls=http://m"], "MemberAdd"),
        (["update", "0000000000000002", "--peer-urls=http://m"], "MemberUpdate"),
        (["remove", "0000000000000002"], "MemberRemove"),
    ):
        for members in (mixed, mixed[:1]):
            full = f"Cluster.{method}"
            answer = METHOD_BY_NAME[full].response(header=HEADER, members=members)
            if method == "MemberAdd":
                answer.member = mixed[1]
            fake.answers[full] = answer
            ended = run_ctl("member", *words)
            is_warned = len(members) == 2 and method != "MemberRemove"
            assert (ended.status, "others https://" in ended.stderr) == (0, is_warned), ended


def test_get_with_a_user_and_endpoint_health_report_a_missing_leader(
    fake: type[FakeClient],
) -> None:
    late = Timeout(text="127.0.0.1:2379: no answer within 2 s", endpoint="127.0.0.1:2379")
    reason = "etcdlite: no leader since 9 s; 1 of 2 voting members reachable"
    fake.answers |= {"KV.Range": late, "Maintenance.Status": proto.StatusResponse(errors=[reason])}
    for words in (("get", "k", "--user=root:secret"), ("endpoint", "health")):
        ended = run_ctl(*words)
        assert ended.status == 1 and reason.removeprefix("etcdlite: ") in ended.stderr
        assert fake.made[-1].tls["user"] == "", "the login needs a leader, too"


@pytest.mark.parametrize("what", ["health", "status", "hashkv"])
def test_endpoints_are_asked_at_the_same_time(fake: type[FakeClient], what: str) -> None:
    all_asked = threading.Barrier(3)

    def answer(_: Any, endpoint: str) -> Any:
        all_asked.wait(30)
        return Timeout(text=f"{endpoint}: no answer", endpoint=endpoint)

    method = {"health": "KV.Range", "status": "Maintenance.Status", "hashkv": "Maintenance.HashKV"}
    fake.answers |= {"Maintenance.Status": ConnectionFailed("no")} | {method[what]: answer}
    ended = run_ctl("endpoint", what, "--endpoints=a:1,b:1,c:1")
    assert ended.status == 1
    for line, endpoint in zip(sorted(ended.stderr.splitlines()), "abc", strict=True):
        assert endpoint + ":1" in line and "no answer" in line


def test_an_endpoint_without_a_host_is_this_machine(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV])
    fake.answers["Maintenance.Status"] = STATUS
    assert run_ctl("get", "foo", "--endpoints=:2379,http://:1,[::1]:5").status == 0
    assert fake.made[-1].endpoints == ["localhost:2379", "http://localhost:1", "[::1]:5"]
    assert run_ctl("endpoint", "status", "--endpoints=:2379").stdout.startswith(b":2379, ")
    assert run_ctl("get", "foo", "--endpoints=::1").status == 0
    assert fake.made[-1].endpoints == ["::1"]


@pytest.mark.parametrize("timeout", ["0s", "0", "-1s"])
def test_a_dial_timeout_of_0_is_no_limit_of_its_own(fake: type[FakeClient], timeout: str) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV])
    words = ("get", "foo", f"--dial-timeout={timeout}", "--command-timeout=7s")
    assert run_ctl(*words).status == 0
    assert fake.made[-1].dial_timeout_s == 7.0


def test_the_environment_sets_global_flags_and_a_flag_beats_it(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV])
    environ = {
        "ETCDCTL_ENDPOINTS": "etcdctl:1",
        "ETCDLITE_CTL_ENDPOINTS": "first:1,second:2",
        "ETCDCTL_HEX": "true",
        "ETCDCTL_COMMAND_TIMEOUT": "7s",
        "ETCDCTL_API": "3",
    }
    assert run_ctl("get", "foo", environ=environ) == (0, b"\\x66\\x6f\\x6f\n\\x62\\x61\\x72\n", "")
    assert (fake.made[-1].endpoints, fake.made[-1].timeout_s) == (["first:1", "second:2"], 7.0)
    run_ctl("get", "foo", "--endpoints", "flag:1", "--endpoints", "flag:2", environ=environ)
    assert fake.made[-1].endpoints == ["flag:1", "flag:2"]
    ended = run_ctl("get", "foo", environ={"ETCDCTL_HEX": "perhaps"})
    assert ended.status == 128
    assert ended.stderr == (
        "Error: invalid value for environment variable ETCDCTL_HEX: strconv.ParseBool: parsing "
        '"perhaps": invalid syntax\n'
    )


def test_a_failure_is_one_line_whatever_a_user_or_a_server_sends(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = EtcdliteError(2, "a\nb\x1b[2J", "127.0.0.1:2379")
    for words in (("get", "a"), ("get", "a", "--hex=a\nb\x1b[2J"), ("a\nb\x1b[2J",)):
        ended = run_ctl(*words)
        assert ended.status == 1 and ended.stderr.count("\n") == 1
        assert "a\\nb\\x1b[2J" in ended.stderr


def test_who_names_no_endpoint_is_told_that_no_server_runs_here(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = ConnectionFailed(text="127.0.0.1:2379: connection refused")
    asks = "; is the server running (systemctl status etcdlite)? --endpoints names another\n"
    text = "127.0.0.1:2379: connection refused"
    assert run_ctl("get", "k").stderr == f"Error: {text}{asks}"
    assert run_ctl("get", "k", "--endpoints=127.0.0.1:2379").stderr == f"Error: {text}\n"
    fake.answers["KV.Range"] = ConnectionFailed(text="10.0.0.1:2379: connection refused")
    assert "systemctl" not in run_ctl("get", "k").stderr, "this is the other one of a mirror"


def test_a_failure_is_one_line_with_etcds_text_and_the_endpoint(fake: type[FakeClient]) -> None:
    fake.answers["KV.Put"] = KeyNotFound(endpoint="10.0.0.1:2379")
    fake.answers["KV.Range"] = ConnectionFailed(text="10.0.0.1:2379: connection refused")
    fake.answers["Lease.LeaseRevoke"] = LeaseNotFound()
    assert run_ctl("put", "k", "v") == (
        1,
        b"",
        "Error: etcdserver: key not found (endpoint 10.0.0.1:2379)\n",
    )
    assert run_ctl("get", "k", "--endpoints", "10.0.0.1:2379") == (
        1,
        b"",
        "Error: 10.0.0.1:2379: connection refused\n",
    )
    assert run_ctl("lease", "revoke", "7") == (
        1,
        b"",
        "Error: failed to revoke lease (etcdserver: requested lease not found) "
        "(endpoint 127.0.0.1:2379)\n",
    )


def test_keep_alive_once_of_a_lost_lease_fails_and_without_once_it_ends(
    fake: type[FakeClient],
) -> None:
    fake.answers["Lease.LeaseKeepAlive"] = proto.LeaseKeepAliveResponse(ID=0x123)
    once = run_ctl("lease", "keep-alive", "123", "--once")
    assert once.status == 2 and "etcdserver: requested lease not found" in once.stderr
    assert run_ctl("lease", "keep-alive", "123") == (
        0,
        b"lease 0000000000000123 expired or revoked.\n",
        "",
    )
    assert run_ctl("lease", "keep-alive", "123", "-w", "json") == (0, b"", "")


def test_a_lease_that_lives_is_kept_alive_though_a_renewal_failed(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr(ctl_commands, "time", FakeTime(slept_s))
    renewed = proto.LeaseKeepAliveResponse(ID=0x123, TTL=9)
    failures = [Timeout(), RequestTooManyRequests(), ConnectionFailed()]
    answers = [renewed, *failures, renewed, proto.LeaseKeepAliveResponse(ID=0x123)]
    fake.answers["Lease.LeaseKeepAlive"] = lambda request, endpoint: answers.pop(0)
    ended = run_ctl("lease", "keep-alive", "123")
    assert (ended.status, ended.stderr, answers) == (0, "", [])
    assert fake.made[0].timeout_s == 3, "a member that stalls leaves time to ask another one"
    # At first, and once the lease may have ended, an error ends the command.
    fake.answers["Maintenance.Status"] = ConnectionFailed()
    answers += [Timeout()]
    assert run_ctl("lease", "keep-alive", "123").status == 1 and not answers
    answers += [renewed] + [Timeout()] * 50
    assert run_ctl("lease", "keep-alive", "123").status == 1 and len(answers) > 30


def test_alarm_disarm_lifts_each_alarm_and_shows_them_together(fake: type[FakeClient]) -> None:
    raised = [proto.AlarmMember(memberID=5, alarm=1), proto.AlarmMember(memberID=6, alarm=1)]

    def answer(request: Any, _: str) -> Any:
        if request.action == 0:
            return proto.AlarmResponse(header=HEADER, alarms=raised)
        return proto.AlarmResponse(
            header=HEADER,
            alarms=[proto.AlarmMember(memberID=request.memberID, alarm=request.alarm)],
        )

    fake.answers["Maintenance.Alarm"] = answer
    assert run_ctl("alarm", "disarm").stdout == (
        b"memberID:5 alarm:NOSPACE \nmemberID:6 alarm:NOSPACE \n"
    )
    assert run_ctl("alarm", "disarm", "-w", "fields").status == 0


def test_each_endpoint_is_asked_and_one_that_fails_is_named(fake: type[FakeClient]) -> None:
    def status(_: Any, endpoint: str) -> Any:
        return (
            ConnectionFailed(text="down:1: connection refused", endpoint="down:1")
            if (endpoint == "down:1")
            else STATUS
        )

    fake.answers["Maintenance.Status"] = status
    fake.answers["Maintenance.Defragment"] = lambda request, endpoint: (
        status(request, endpoint) if endpoint == "down:1" else proto.DefragmentResponse()
    )
    ended = run_ctl("endpoint", "status", "--endpoints", "down:1,up:1")
    assert ended.status == 1
    assert ended.stdout.startswith(b"up:1, 69aec3b215758275, ")
    assert ended.stderr == "Failed to get the status of endpoint down:1 (connection refused)\n"
    ended = run_ctl("defrag", "--endpoints", "down:1,up:1")
    assert ended == (
        1,
        b"Finished defragmenting etcd member[up:1]\n",
        "Failed to defragment etcd member[down:1] (connection refused)\n",
    )


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [("defrag", True), ("compaction 3", True), ("endpoint hashkv", False)],
)
def test_work_that_takes_too_long_is_named_with_what_to_do(command: str, goes_on: bool) -> None:
    with FakeServer() as server:
        server.intercept = lambda connection, request_id, method, message: IGNORE
        flags = (f"--endpoints={server.endpoint}", "--command-timeout=300ms")
        ended = run_ctl(*command.split(), *flags)
    assert ended.status == 1
    assert server.endpoint in ended.stderr and " was not answered within 0.3 s; " in ended.stderr
    assert ("it goes on there" in ended.stderr) == goes_on
    assert "--command-timeout waits longer" in ended.stderr


def test_cluster_asks_the_members_endpoints(fake: type[FakeClient]) -> None:
    fake.answers["Cluster.MemberList"] = MEMBERS
    fake.answers["Maintenance.HashKV"] = proto.HashKVResponse(header=HEADER, hash=7)
    ended = run_ctl("endpoint", "hashkv", "--cluster")
    assert ended == (0, b"http://127.0.0.1:43655, 7\n", "")


def test_a_change_of_members_waits_for_a_voter_that_has_just_come_back(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr(ctl_commands, "time", FakeTime(slept_s))
    changed = proto.MemberRemoveResponse(header=HEADER)
    answers: list[Any] = [Unhealthy(), Unhealthy(), changed]
    fake.answers["Cluster.MemberRemove"] = lambda request, endpoint: answers.pop(0)
    ended = run_ctl("member", "remove", "6243b8478cc8223c")
    assert ended.status == 0 and not answers
    assert ended.stderr == (
        "etcdserver: unhealthy cluster (etcdlite-ctl doctor shows which members are missing): "
        "trying again for 6s\n"
    )
    assert sum(slept_s) == 1
    # One that is not in contact is not waited for any longer.
    fake.answers["Cluster.MemberRemove"] = Unhealthy()
    ended = run_ctl("member", "remove", "6243b8478cc8223c")
    assert ended.status == 1 and "Error: etcdserver: unhealthy cluster" in ended.stderr
    assert 6 < sum(slept_s) - 1 < 8
    # Another refusal is the answer.
    del slept_s[:]
    fake.answers["Cluster.MemberRemove"] = EtcdliteError(5, "etcdserver: member not found")
    assert run_ctl("member", "remove", "6243b8478cc8223c").status == 1 and not slept_s


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self, slept_s: list[float]) -> None:
        self.sleep = slept_s.append
        self.monotonic = lambda: sum(slept_s)


def test_health_is_a_read_that_is_served_and_no_alarm(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(header=HEADER)
    fake.answers["Maintenance.Alarm"] = proto.AlarmResponse(header=HEADER)
    fake.answers["Maintenance.Status"] = proto.StatusResponse(header=HEADER)
    ended = run_ctl("endpoint", "health")
    assert ended.status == 0
    assert ended.stdout.startswith(
        b"127.0.0.1:2379 is healthy: successfully committed proposal: took = "
    )
    fake.answers["KV.Range"] = EtcdliteError(7, "etcdserver: permission denied")
    assert run_ctl("endpoint", "health").status == 0
    fake.answers["Maintenance.Alarm"] = proto.AlarmResponse(
        alarms=[proto.AlarmMember(memberID=5, alarm=1)]
    )
    assert run_ctl("endpoint", "health") == (
        1,
        b"",
        "127.0.0.1:2379 is unhealthy: failed to commit proposal: Active Alarm(s): NOSPACE \n",
    )
    fake.answers["Maintenance.Alarm"] = proto.AlarmResponse(header=HEADER)
    damaged = "etcdlite: this member's disk has damaged data; its log says where"
    fake.answers["Maintenance.Status"] = proto.StatusResponse(errors=[damaged])
    ended = run_ctl("endpoint", "health")
    assert ended.status == 1 and damaged in ended.stderr


# Transactions.


@pytest.mark.parametrize(
    ("line", "compare"),
    [
        ('mod("foo") > "0"', {"target": 2, "result": 1, "key": b"foo", "mod_revision": 0}),
        ('m("foo") = "007"', {"target": 2, "key": b"foo", "mod_revision": 7}),
        (
            ' create("a b")  !=  "1" ',
            {"target": 1, "result": 3, "key": b"a b", "create_revision": 1},
        ),
        ('ver("foo") < "+2"', {"result": 2, "key": b"foo", "version": 2}),
        (
            r'value("k\x00") = "\x01\xff a"',
            {"target": 3, "key": b"k\0", "value": b"\x01\xff a"},
        ),
        ('lease("foo") = "1f"', {"target": 4, "key": b"foo", "lease": 31}),
        ('val("foo") = ""', {"target": 3, "key": b"foo", "value": b""}),
    ],
)
def test_a_comparison_is_read(line: str, compare: dict[str, Any]) -> None:
    assert parse_compare(line) == proto.Compare(**compare)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("bogus", "malformed comparison: bogus"),
        ('mod(foo) > "0"', 'malformed comparison: mod(foo) > "0"'),
        ('version("foo")="0"', 'malformed comparison: version("foo")="0"'),
        ('mod("foo") > 0', 'malformed comparison: mod("foo") > 0'),
        (
            'bogus("foo") > "0"',
            'malformed comparison: bogus("foo") > "0" (unknown target bogus)',
        ),
        ('mod("a") >= "0"', 'malformed comparison: mod("a") >= "0" (unknown operator >=)'),
        ('mod("foo") > "x"', 'invalid txn compare request: mod("foo") > "x"'),
    ],
)
def test_a_malformed_comparison_is_shown(line: str, text: str) -> None:
    ended = run_ctl("txn", stdin=line.encode() + b"\n\n\n\n")
    assert ended.status == 3
    assert ended.stderr.startswith(f"Error: {text}")


@pytest.mark.parametrize(
    ("line", "op"),
    [
        ("put a b", {"request_put": proto.PutRequest(key=b"a", value=b"b")}),
        (
            r'put "a b" "x\ty\x01\u20ac" --prev-kv',
            {"request_put": proto.PutRequest(key=b"a b", value="x\ty\x01€".encode(), prev_kv=True)},
        ),
        (r"put a 'x \y'", {"request_put": proto.PutRequest(key=b"a", value=rb"x \y")}),
        ('put a ""', {"request_put": proto.PutRequest(key=b"a")}),
        ("put -- a -b", {"request_put": proto.PutRequest(key=b"a", value=b"-b")}),
        ("get a --prefix", {"request_range": proto.RangeRequest(key=b"a", range_end=b"b")}),
        ("del a b", {"request_delete_range": proto.DeleteRangeRequest(key=b"a", range_end=b"b")}),
    ],
)
def test_a_request_line_is_read(line: str, op: dict[str, Any]) -> None:
    assert parse_request(line) == proto.RequestOp(**op)


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("bogus a", 3, "invalid txn request: bogus a"),
        ("get", 3, "invalid txn compare request: get"),
        ("put k", 128, "put command needs 1 argument and input from stdin or 2 arguments"),
        ("get a --bogus", 3, "invalid txn request: get a --bogus (unknown flag: --bogus)"),
        ('put a "b', 3, 'invalid txn request: put a "b (unclosed quote)'),
        (r'put a "\q"', 3, r'invalid txn request: put a "\q" (bad escape \q)'),
        ("get a --order x", 4, "bad sort order x"),
    ],
)
def test_a_malformed_request_line_is_shown(line: str, status: int, text: str) -> None:
    with pytest.raises(Failure) as failure:
        parse_request(line)
    assert (failure.value.status, failure.value.text) == (status, text)


def test_a_transaction_is_three_blocks(fake: type[FakeClient]) -> None:
    fake.answers["KV.Txn"] = proto.TxnResponse(header=HEADER, succeeded=True)
    stdin = b'mod("a") = "0"\n\nput a 1\nget a\n\ndel a\n\n'
    prompts = b"compares:\nsuccess requests (get, put, del):\nfailure requests (get, put, del):\n"
    assert run_ctl("txn", stdin=stdin) == (0, b"SUCCESS\n", "")
    assert run_ctl("txn", "-i", stdin=stdin) == (0, prompts + b"SUCCESS\n", "")
    (_, request), _ = fake.calls
    assert (len(request.compare), len(request.success), len(request.failure)) == (1, 2, 1)
    for short in (b"", b"\n", b"\nput a 1\n\n", b'mod("a") = "0"'):
        ended = run_ctl("txn", stdin=short)
        assert ended.status == 3 and ended.stderr.startswith("Error: EOF: ")
    assert len(fake.calls) == 2


LABELLED = """compares:
value("user1") = "bad"

success requests (get, put, delete):
del user1

failure requests (get, put, delete):
put user1 good
get user1
"""


@pytest.mark.parametrize(
    "text",
    [
        LABELLED,
        LABELLED.replace("\n\n", "\n"),
        'compare:\nval("user1") = "bad"\nsuccess:\ndel user1\nfailure:\nput user1 good\nget user1',
        'FAILURE\nput user1 good\n\nget user1\nSuccess\ndel user1\ncompare\nval("user1") = "bad"\n',
    ],
)
def test_the_blocks_of_a_transaction_may_have_labels(text: str, fake: type[FakeClient]) -> None:
    fake.answers["KV.Txn"] = proto.TxnResponse(header=HEADER, succeeded=True)
    for words in (("txn",), ("txn", "-i")):
        assert run_ctl(*words, stdin=text.encode()).status == 0
        _, request = fake.calls[-1]
        assert [compare.value for compare in request.compare] == [b"bad"]
        assert request.success[0].request_delete_range.key == b"user1"
        assert [op.request_put is not None for op in request.failure] == [True, False]


def test_labels_of_a_transaction_are_given_once(fake: type[FakeClient]) -> None:
    fake.answers["KV.Txn"] = proto.TxnResponse(header=HEADER, succeeded=True)
    assert run_ctl("txn", stdin=b"success:\nget a\n").status == 0
    ended = run_ctl("txn", stdin=b"success:\nget a\nsuccess:\n")
    assert ended.stderr == "Error: the transaction has two sections success\n"
    ended = run_ctl("txn", stdin=b"compares:\nget a\n")
    assert ended.status == 3 and "malformed comparison: get a" in ended.stderr


# Snapshots, checks.


def test_a_file_that_is_no_snapshot_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "no").write_bytes(b"root:x:0:0")
    for words in (
        ("status", str(tmp_path / "no")),
        ("status", str(tmp_path / "missing")),
        ("restore", str(tmp_path / "no"), "--data-dir", str(tmp_path / "new")),
    ):
        ended = run_ctl("snapshot", *words)
        assert (ended.status, ended.stdout) == (1, b"")
        assert ended.stderr.startswith("Error: ") and ended.stderr.count("\n") == 1
        assert words[1] in ended.stderr


def test_check_perf_judges_rate_slowest_and_deviation() -> None:
    puts = ctl_check.Puts()
    puts.took_s = [0.002] * 9000
    puts.elapsed_s = 60.0
    assert ctl_check.perf_verdict(puts, 150) == (
        [
            "PASS: Throughput is 151 writes/s",
            "PASS: Slowest request took 0.002000s",
            "PASS: Stddev is 0.000000s",
            "PASS",
        ],
        True,
    )
    puts.took_s = [0.002] * 100 + [0.6, 3.0]
    puts.errors["etcdserver: mvcc: database space exceeded"] = 8898
    lines, passed = ctl_check.perf_verdict(puts, 150)
    assert not passed
    assert lines[:4] == [
        "FAIL: too many errors",
        "FAIL: ERROR(etcdserver: mvcc: database space exceeded) -> 8898",
        "FAIL: Throughput too low: 2 writes/s",
        "Slowest request took too long: 3.000000s",
    ]
    assert lines[4].startswith("Stddev too high: 0.") and lines[5] == "FAIL"


def test_check_refuses_a_prefix_that_has_keys(fake: type[FakeClient]) -> None:
    fake.answers["KV.Range"] = proto.RangeResponse(kvs=[KV], count=1)
    assert run_ctl("check", "perf") == (
        3,
        b"",
        'Error: prefix "/etcdctl-check-perf/" has keys. Delete with '
        "'etcdlite-ctl del --prefix /etcdctl-check-perf/' first\n",
    )


# Help and completion.


def test_help_names_every_command_and_every_flag() -> None:
    shown = run_ctl("--help").stdout.decode()
    for command in ctl.COMMANDS:
        assert f"  {command.name} " in shown
        help_text = run_ctl(*command.name.split(), "--help")
        assert help_text.status == 0
        for flag in (*command.flags, *ctl_flags.GLOBAL_FLAGS):
            assert f"--{flag.name}" in help_text.stdout.decode()
    assert run_ctl("help", "lease", "grant") == run_ctl("lease", "grant", "-h")
    assert run_ctl("lease").stdout == run_ctl("lease", "--help").stdout
    assert run_ctl().stdout.decode() == shown


def test_every_line_of_help_fits_a_wide_terminal() -> None:
    for command in ctl.COMMANDS:
        assert max(map(len, ctl_help.command_help(command).splitlines())) <= 120, command.name


def test_every_printing_command_has_a_printer_that_exists() -> None:
    for command in ctl.COMMANDS:
        if command.prints:
            assert Printer("simple").supports(command.prints), command.name


def test_bash_completes_commands_subcommands_and_flags(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_bytes(run_ctl("completion", "bash").stdout)

    def complete(*words: str) -> list[str]:
        program = (
            f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            '_etcdlite_ctl; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", program, "bash", "etcdlite-ctl", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert complete("le") == ["lease"]
    assert sorted(complete("lease", "")) == ["grant", "keep-alive", "list", "revoke", "timetolive"]
    assert complete("get", "--pr") == ["--prefix", "--print-value-only"]
    assert "--endpoints" in complete("lease", "grant", "--")
    assert complete("completion", "") == ["bash", "fish", "zsh"]
    assert complete("get", "fo") == []
    # Values of flags are no commands. bash cuts words at ":" and "=".
    assert complete("--endpoints", "10.0.0.1", ":", "2379", "lea") == ["lease"]
    assert complete("--hex", "=", "true", "lease", "gr") == ["grant"]
    assert complete("--prefix", "=", "true", "get", "--pr") == ["--prefix", "--print-value-only"]
    assert complete("-w", "json", "snapshot", "sa") == ["save"]
    assert complete("get", "--write-out", "=", "ta") == complete("-w", "ta") == ["table"]
    assert complete("--write-out", "=") == complete("-w", "") != []
    assert complete("--hex", "=") == []
    assert complete("--cacert", "c") == [], "a file, by the shell's own completion"
    assert complete("get", "--order", "") == ["ASCEND", "DESCEND"]
    assert complete("get", "--sort-by", "=", "V") == ["VALUE", "VERSION"]
    assert complete("get", "--consistency", "") == ["l", "s"]
    assert complete("check", "perf", "--load", "x") == ["xl"]
    assert complete("snapshot", "save", "--format", "") == ["etcdlite", "etcd"]
    assert b"bashcompinit" in run_ctl("completion", "zsh").stdout


def test_the_guide_names_every_command_and_every_flag() -> None:
    guide = (ROOT / "docs" / "etcdlite-ctl.md").read_text()
    for command in ctl.COMMANDS:
        assert f"`{command.name}" in guide, command.name
        for flag in command.flags:
            assert f"--{flag.name}" in guide, (command.name, flag.name)
    for flag in ctl_flags.GLOBAL_FLAGS:
        assert f"--{flag.name}" in guide, flag.name


def test_options_that_this_user_may_not_read_are_mentioned(fake: type[FakeClient]) -> None:
    refused = ConnectionFailed(text="127.0.0.1:2379: it may want TLS", endpoint="127.0.0.1:2379")
    fake.answers["KV.Range"] = refused
    with mock.patch("etcdlite.cli.flags.open", side_effect=PermissionError, create=True):
        ended = run_ctl("get", "a")
    assert ended.status == 1 and "/etc/etcdlite/ctl.toml may have the options" in ended.stderr
    assert "ctl.toml" not in run_ctl("get", "a").stderr


def test_version_tells_its_own_and_the_apis() -> None:
    assert run_ctl("--version") == run_ctl("version")
    ended = run_ctl("version", "-w", "json")
    assert ended.status == 0
    assert ended.stdout.startswith(b"etcdlite-ctl version: ")
    assert b"\nAPI version: 3." in ended.stdout


@pytest.mark.parametrize("words", ["etcdlite.ctl --help", "etcdlite.ctl version", "etcdlite --help",
                                   "etcdlite --version"])  # fmt: skip
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_no_traceback(words: str, unbuffered: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", *words.split()]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full, open(writer, "wb") as pipe:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environ)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1
        assert b"no space left on device" in done.stderr.lower()
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=environ)
        assert done.returncode in (1, 141) and done.stderr == b""


def test_a_get_imports_no_more_than_it_needs() -> None:
    """Shell loops start etcdlite-ctl thousands of times."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; before = set(sys.modules); from etcdlite.ctl import main; "
            "main(['get', 'x', '--endpoints=127.0.0.1:1']); print(*set(sys.modules) - before)",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "etcdlite.cli.commands" in loaded
    heavy = {"asyncio", "argparse", "dataclasses", "difflib", "subprocess", "urllib.request"}
    others = {f"etcdlite.{name}" for name in ("cli.watch", "cli.check", "cli.help", "mvcc", "wal")}
    assert not loaded & (heavy | others)


def test_a_progress_line_is_drawn_only_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ctl_session.Progress("restoring")
    progress.update(5, 10)
    progress.clear()
    assert capsys.readouterr().err == ""


def test_a_failed_command_of_a_lock_gives_its_status() -> None:
    class Place:
        key = b"l/7"
        revision = 9
        lost = False

    with pytest.raises(Failure) as failure:
        ctl_locks.run_holding(
            Place(), ["sh", "-c", 'test "$ETCD_LOCK_KEY $ETCD_LOCK_REV" = "l/7 9" && exit 7']
        )
    assert (failure.value.status, failure.value.text) == (7, "exit status 7")
    with pytest.raises(Failure) as failure:
        ctl_locks.run_holding(Place(), ["no-such-program-here"])
    assert failure.value.status == 1 and "executable file not found" in failure.value.text


def empty_replies(_: FakeConnection, request_id: int, name: str, __: Any) -> bytes | None:
    """Answers everything with an empty message."""
    if name == "Ping":
        return None
    method = METHOD_BY_NAME[name]
    first = frames.frame(request_id, method.number, 0 if method.server_stream else frames.END, b"")
    if not method.server_stream:
        return first
    return first + frames.frame(request_id, method.number, frames.END, b"")


@pytest.mark.parametrize(
    "command",
    [
        "member add m --peer-urls=http://a:1",
        "member remove 1000000000000001",
        "member update 1000000000000001 --peer-urls=http://a:1",
        "member promote 1000000000000001",
        "move-leader 1000000000000001",
        "watch k",
        "history k",
        "diff",
        "check perf",
    ],
)
def test_a_reply_without_what_etcd_always_sends_ends_a_command_with_an_error(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctl_check, "CHECK_SECONDS", 1)
    with FakeServer() as server:
        server.intercept = empty_replies
        ended = run_ctl(*command.split(), f"--endpoints={server.endpoint}")
    assert ended.status == 1
    assert "the server's answer has no " in ended.stderr
    assert server.endpoint in ended.stderr


@pytest.mark.parametrize(
    ("command", "answers"),
    [
        ("endpoint status", proto.StatusResponse(version="3.5.0", leader=2, header=HEADER)),
        ("endpoint hashkv", proto.HashKVResponse(hash=1, header=HEADER)),
        ("endpoint health", None),
        ("defrag", proto.DefragmentResponse()),
    ],
)
def test_a_member_with_a_bad_url_does_not_hide_the_others(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch, command: str, answers: Any
) -> None:
    bad, good = "http://bad_port:x", "http://good:1"

    class Checked(FakeClient):
        def __init__(self, endpoints: list[str], *args: Any, **tls: Any) -> None:
            if bad in endpoints:
                raise ValueError(f"endpoint {bad!r}: 'x' is not a port")
            super().__init__(endpoints, *args, **tls)

    monkeypatch.setattr(ctl_session, "Client", Checked)
    members = [proto.Member(clientURLs=[bad]), proto.Member(clientURLs=[good])]
    fake.answers["Cluster.MemberList"] = proto.MemberListResponse(header=HEADER, members=members)
    fake.answers["KV.Range"] = proto.RangeResponse(header=HEADER)
    fake.answers["Maintenance.Alarm"] = proto.AlarmResponse(header=HEADER)
    for method in ("Status", "HashKV", "Defragment"):
        fake.answers[f"Maintenance.{method}"] = answers or proto.StatusResponse(header=HEADER)
    ended = run_ctl(*command.split(), "--cluster")
    assert ended.status == 1
    assert "'x' is not a port" in ended.stderr
    assert good in ended.stdout.decode()


def test_the_leader_is_found_beside_a_member_with_a_bad_url(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(endpoints: list[str], *args: Any, **tls: Any) -> FakeClient:
        if endpoints == ["http://bad:x"]:
            raise ValueError("not a port")
        return FakeClient(endpoints, *args, **tls)

    monkeypatch.setattr(ctl_session, "Client", client)
    members = [proto.Member(clientURLs=["http://bad:x"]), proto.Member(clientURLs=["http://a:1"])]
    fake.answers["Cluster.MemberList"] = proto.MemberListResponse(header=HEADER, members=members)
    leader = proto.StatusResponse(header=HEADER, leader=HEADER.member_id)
    fake.answers["Maintenance.Status"] = leader
    fake.answers["Maintenance.MoveLeader"] = proto.MoveLeaderResponse(header=HEADER)
    assert run_ctl("move-leader", "1000000000000001", "--cluster").status == 0


@pytest.mark.parametrize(("asked", "created_at"), [(0, 10), (5, 70)])
def test_a_watch_goes_on_after_the_last_progress_mark(asked: int, created_at: int) -> None:
    """Not after the last event: the history since then may be compacted."""
    watch = ctl_watch.Watch(proto.WatchCreateRequest(key=b"k", start_revision=asked), ())

    def resumes_after(revision: int, **fields: Any) -> int:
        header = proto.ResponseHeader(revision=revision)
        watch.advance(proto.WatchResponse(header=header, **fields))
        return watch.request.start_revision

    assert resumes_after(created_at, created=True) == (asked or created_at + 1)
    event = proto.Event(kv=proto.KeyValue(key=b"k", mod_revision=12))
    assert resumes_after(60, events=[event]) == 13, "a response with events promises no more"
    assert resumes_after(70) == 71
    assert resumes_after(65) == 71
