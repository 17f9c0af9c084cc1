"""What the benchmarks compare and count: a mistake there would look like a figure."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bench import etcd_benchmark, real_clients
from bench.instructions import LOADS, ROOT, Counted, has_changed
from bench.servers import Server


def rounds(changing: str, *values: float) -> list[list[float]]:
    """The figures of some rounds that differ in one row."""
    return [[value if row == changing else 1.0 for row in real_clients.ROWS] for value in values]


def test_a_change_is_named_if_each_round_shows_it():
    found = {
        ("put", "now"): rounds("CPU µs", 30.0, 44.0, 31.0),
        ("put", "before"): rounds("CPU µs", 33.0, 50.0, 34.0),
        ("range", "now"): rounds("CPU µs", 10.0, 30.0, 10.0),
        ("range", "before"): rounds("CPU µs", 20.0, 20.0, 20.0),
        ("txn", "now"): rounds("p50 ms", 2.0, 2.2, 2.1),
        ("txn", "before"): rounds("p50 ms", 1.0, 1.0, 1.0),
    }
    assert real_clients.changes(found, "now", "before") == [
        "2.10 times p50 ms: txn (1, now 2.1)",
        "0.91 times CPU µs: put (34, now 31)",
    ]


def test_bytes_where_none_were_written_are_no_change():
    found = {
        ("range", "now"): rounds("bytes", 8.0),
        ("range", "before"): rounds("bytes", 0.0),
    }
    assert real_clients.changes(found, "now", "before") == []


def test_the_imitation_of_etcds_tool_knows_every_load(tmp_path):
    with Server("etcdlite", str(tmp_path), tree=str(ROOT)) as server:
        for workload in real_clients.WORKLOADS:
            for part in workload.parts:
                words = [w for w in part.split() if not w.startswith(("--total=", "--clients="))]
                words += ["--total=20", "--clients=4"]
                report = etcd_benchmark.finish(etcd_benchmark.start(None, [server.port], words))
                assert 0 < report.p50_ms <= report.max_ms, workload.name


@pytest.mark.parametrize("load", ["put", "range"])
def test_the_instructions_of_a_request_are_counted(tmp_path: Path, load: str):
    counted = Counted(str(tmp_path), 1, str(ROOT))
    try:
        (member,) = counted.members
        member.wait_until_listening()
        least, *_, middle = counted.per_request(member.port, *LOADS[load])
        assert 1000 < least <= middle < 20_000
    finally:
        counted.remove()


def test_a_change_of_instructions_shows_at_each_percentile():
    assert has_changed("range", [2448, 2448, 2448], [2402, 2402, 2402])
    assert not has_changed("put", [5413, 5413, 5413], [5259, 5413, 5413])
    assert not has_changed("put", [5437, 5509, 5509], [5509, 5437, 5437])
    assert not has_changed("3 members: range", [10080, 10786, 10786], [10074, 10200, 10300])


def test_each_server_has_every_place_in_the_order_and_follows_every_other():
    names = ["now", "before", "etcd"]
    orders = [real_clients.order(names, number) for number in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders[:3]) == sorted(names)
    pairs = {pair for order in orders for pair in itertools.pairwise(order)}
    assert len(pairs) == 6
    assert [real_clients.order(names[:2], number)[0] for number in range(2)] == names[:2]
