"""`etcdlite-ctl top`: what it counts, what it shows, and its screen."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rigs.ctl_runner import run_ctl
from rigs.processes import PATIENCE_S, ROOT, ServerFactory, ServerProcess, wait_until

from etcdlite import proto
from etcdlite.cli import changes
from etcdlite.cli.changes import Changes, ChangeWatch, Counts, prefix_of
from etcdlite.cli.roster import Seen
from etcdlite.cli.scrape import Series
from etcdlite.cli.top_view import View, lines
from etcdlite.client import Client

# Counting.


@pytest.mark.parametrize(
    "key, depth, prefix",
    [
        (b"/registry/pods/a/b", 1, b"/registry/"),
        (b"/registry/pods/a/b", 2, b"/registry/pods/"),
        (b"/registry/pods/a/b", 9, b"/registry/pods/a/b"),
        (b"/registry/pods/a/b", 0, b"/registry/pods/a/b"),
        (b"jobs/1/2", 1, b"jobs/"),
        (b"jobs/1/2", 2, b"jobs/1/"),
        (b"jobs/", 1, b"jobs/"),
        (b"jobs", 2, b"jobs"),
        (b"a//b", 2, b"a//"),
        (b"/", 1, b"/"),
        (b"//x", 1, b"//"),
        (b"\0\xff", 1, b"\0\xff"),
        (b"k" * 5000, 1, b"k" * changes.MAX_PREFIX_BYTES),
    ],
)
def test_a_prefix_is_a_number_of_parts(key: bytes, depth: int, prefix: bytes) -> None:
    assert prefix_of(key, depth) == prefix


def test_the_rates_are_those_of_the_time_that_was_watched() -> None:
    counts = Counts(1)
    for _ in range(20):
        counts.begin_interval()
        for number in range(100):
            counts.add(b"hot/%d" % number)
        counts.add(b"cold")
        seen = counts.end_interval(0.5, 2.0)
    rates = dict(seen.rates)
    assert list(rates) == [b"hot/", b"cold"]
    assert rates[b"hot/"] == pytest.approx(200.0)
    assert rates[b"cold"] == pytest.approx(2.0)
    assert seen.share == pytest.approx(0.25)
    for _ in range(40):
        counts.begin_interval()
        seen = counts.end_interval(1.0, 1.0)
    assert seen == Changes((), pytest.approx(1.0)), "what ended long ago is forgotten"


def test_any_number_of_keys_takes_a_bounded_number_of_counts() -> None:
    counts = Counts(0)
    counts.begin_interval()
    for number in range(20 * changes.MAX_PREFIXES):
        counts.add(b"%d" % number)
        if number % 20 == 0:
            counts.add(b"hot")
    assert len(counts._counts) <= 2 * changes.MAX_PREFIXES
    seen = counts.end_interval(1.0, 1.0)
    assert seen.rates[0] == (b"hot", changes.MAX_PREFIXES)
    assert len(seen.rates) == changes.SHOWN_PREFIXES


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("top") / "data"
    process = ServerProcess(folder, ["--name=m1"], (sys.executable, "-m", "etcdlite"))
    yield process.start()
    process.close()


@pytest.fixture
def load(running: ServerProcess) -> Iterator[None]:
    """Puts below hot/, until the end of the test."""
    stopping = threading.Event()

    def put() -> None:
        with Client(running.endpoint, timeout_s=PATIENCE_S) as client:
            number = 0
            while not stopping.wait(0.002):
                number += 1
                client.put(f"hot/{number % 50}", "v")

    thread = threading.Thread(target=put)
    thread.start()
    yield
    stopping.set()
    thread.join()


def test_the_watch_sees_what_changes(running: ServerProcess, load: None) -> None:
    watch = ChangeWatch(Client(running.endpoint), 1, 0.1)
    wait_until(lambda: watch.seen.rates, "it sees changes")
    assert watch.seen.rates[0][0] == b"hot/" and watch.seen.rates[0][1] > 1
    assert watch.seen.share == pytest.approx(1.0)
    watch.close()


def test_many_changes_are_sampled(
    running: ServerProcess, load: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_EVENTS", 3)
    watch = ChangeWatch(Client(running.endpoint), 1, 0.4)
    wait_until(lambda: watch.seen.rates, "it sees changes")
    assert 0 < watch.seen.share < 0.9
    watch.close()


def test_a_watch_says_why_it_sees_nothing_and_tries_again(server: ServerFactory) -> None:
    one = server()
    endpoint = one.endpoint
    one.kill()
    watch = ChangeWatch(Client(endpoint, dial_timeout_s=0.2, timeout_s=1.0), 1, 0.1)
    wait_until(lambda: watch.seen.error, "it says that it does not see")
    assert "connection refused" in watch.seen.error
    one.start(f"--listen-client-urls=http://{endpoint}")
    wait_until(lambda: watch.seen.share and not watch.seen.error, "it watches")
    watch.close()


def test_what_ends_a_watch_of_changes_is_shown_whatever_it_is() -> None:
    class Broken:
        timeout_s = 1.0

        def watch(self, **_: Any) -> Any:
            raise OSError("no descriptor is left")

        def close(self) -> None:
            pass

    watch = ChangeWatch(Broken(), 1, 0.1)  # type: ignore[arg-type]
    wait_until(lambda: watch.seen.error == "no descriptor is left", "it is shown")
    watch.close()


# The lines.


def seen(name: str, at_s: float, metrics: str = "", **fields: Any) -> Seen:
    about = {"leader": 1, "raftIndex": 100, "raftAppliedIndex": 100, "dbSize": 12_000_000}
    about |= {"dbSizeInUse": 10_000_000, "dbSizeQuota": 2_000_000_000, "version": "3.6.0"}
    header = proto.ResponseHeader(revision=77, member_id=int(name[1:]))
    status = proto.StatusResponse(header=header, **{**about, **fields})
    series = Series(metrics.encode(), 0.0, 0.0, at_s)
    return Seen(name, int(name[1:]), f"10.0.0.{name[1:]}:2379", status=status, series=series)


def shown(before: list[Seen], now: list[Seen], seen: Changes | None = None) -> str:
    return "\n".join(lines(View(before, now, seen or Changes(), 0.0)))


SYNCS = "etcdlite_log_sync_duration_seconds_bucket"


def test_the_rates_are_those_between_two_looks() -> None:
    before = "etcd_mvcc_put_total 100\nprocess_cpu_seconds_total 1\n"
    before += f'{SYNCS}{{le="0.001"}} 50\n{SYNCS}{{le="0.01"}} 50\n{SYNCS}{{le="+Inf"}} 50\n'
    after = "etcd_mvcc_put_total 350\nprocess_cpu_seconds_total 2\netcdlite_leases 4\n"
    after += f'{SYNCS}{{le="0.001"}} 50\n{SYNCS}{{le="0.01"}} 60\n{SYNCS}{{le="+Inf"}} 60\n'
    text = shown([seen("m1", 10.0, before)], [seen("m1", 12.0, after)])
    assert "1 of 1 members answer  leader m1  revision 77" in text
    assert "125 puts/s" in text and "4 leases" in text and "10 MB in use of 2.0 GB" in text
    row = next(line for line in text.splitlines() if line.startswith("m1 "))
    assert " 10 ms  10 ms " in row and row.endswith("50%")


def test_what_is_not_known_is_a_dash_and_a_restart_is_no_negative_rate() -> None:
    text = shown(
        [seen("m1", 10.0, "etcd_mvcc_put_total 100")], [seen("m1", 12.0, "etcd_mvcc_put_total 3")]
    )
    assert "- puts/s  - deletes/s" in text and "- leases" in text
    assert "- puts/s" in shown([], [seen("m1", 1.0)._replace(series=None)])


def test_members_that_lag_or_do_not_answer_are_shown() -> None:
    dead = Seen("m3", 3, "10.0.0.3:2379", error="connection refused\x1b[2J")
    text = shown([], [seen("m1", 1.0), seen("m2", 1.0, raftAppliedIndex=60), dead])
    assert "2 of 3 members answer" in text and "m3" in text
    assert "does not answer: connection refused\\x1b[2J" in text
    row = next(line for line in text.splitlines() if line.startswith("m2 "))
    assert row.split()[1] == "follower" and " 40 " in row
    assert "\x1b" not in text
    assert "0 of 1 members answer  NO LEADER" in shown([], [dead])
    alarm = shown([], [seen("m1", 1.0, leader=0, errors=["memberID:1 alarm:NOSPACE "])])
    assert "NO LEADER" in alarm and "! memberID:1 alarm:NOSPACE" in alarm


def test_a_sample_is_called_one_and_keys_are_printable() -> None:
    text = shown([], [seen("m1", 1.0)], Changes(((b"a/\x1b\xff", 12.345),), 0.2))
    assert "CHANGES/S  KEY OR PREFIX  (a sample: 20% of the time)\n     12.3  a/\\x1b\\xff" in text
    assert "sample" not in shown([], [seen("m1", 1.0)], Changes(((b"a", 1.0),), 1.0))
    assert "not seen: why" in shown([], [seen("m1", 1.0)], Changes(error="why"))


# The command.


def top_with(text: str, *words: str) -> str:
    """What top prints, once it has this text: a watch may take longer to begin than an interval."""

    def found() -> str:
        ended = run_ctl("top", *words)
        assert (ended.status, ended.stderr) == (0, "")
        printed = ended.stdout.decode()
        return printed if text in printed else ""

    return wait_until(found, f"top prints {text!r}")


def test_without_a_terminal_it_prints_snapshots(running: ServerProcess, load: None) -> None:
    endpoint = f"--endpoints={running.endpoint}"
    text = top_with("  hot/\n", endpoint, "--interval=1s", "--depth=1")
    assert "1 of 1 members answer  leader m1" in text
    assert float(re.search(r"(\S+) puts/s", text)[1]) > 1  # type: ignore[index]
    ended = run_ctl("top", endpoint, "--interval=0.2s", "--count=3")
    assert ended.stdout.count(b"MEMBER ") == 3


@pytest.mark.parametrize(
    "words, status",
    [
        ("--interval=1ms", 128),
        ("--count=-1", 128),
        ("--depth=99", 128),
        ("extra", 128),
        ("-w json", 4),
    ],
)
def test_what_it_cannot_do_is_refused(words: str, status: int) -> None:
    assert run_ctl("top", *words.split()).status == status


def test_users_need_the_right_to_read_all_keys(server: ServerFactory) -> None:
    one = server()
    endpoint = f"--endpoints={one.endpoint}"
    for line in ("user add root:pw", "user add bob:pw", "auth enable --user root:pw"):
        assert run_ctl(*line.split(), endpoint).status == 0
    refusal = "not seen: this needs a user who may read all keys"
    assert "1 of 1 members answer" in top_with(refusal, endpoint, "--interval=1s", "--user=bob:pw")
    ended = run_ctl("top", endpoint, "--interval=0.2s", "--user=root:pw")
    assert b"1 of 1 members answer" in ended.stdout and b"not seen" not in ended.stdout


def test_top_and_doctor_work_with_tls(server: ServerFactory) -> None:
    one = server("--auto-tls", "--listen-client-urls=https://127.0.0.1:0")
    words = (f"--endpoints=https://{one.endpoint}", "--insecure-skip-tls-verify")
    text = run_ctl("top", *words, "--interval=0.2s").stdout.decode()
    assert "leader default" in text and "- puts/s" not in text
    ended = run_ctl("doctor", *words)
    assert (ended.status, ended.stdout) == (0, b""), ended
    assert "metrics" not in ended.stderr


def test_its_screen_shows_the_cluster_and_ends_with_q(running: ServerProcess, load: None) -> None:
    command = [sys.executable, "-m", "etcdlite.ctl", "top", f"--endpoints={running.endpoint}"]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, "--interval=0.2s"], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    )
    os.close(theirs)
    written = b""
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (b"members answer" in written and b"hot/" in written):
            assert time.monotonic() < deadline and process.poll() is None, written
            if select.select([ours], [], [], 0.1)[0]:
                written += os.read(ours, 1 << 16)
        os.write(ours, b"q")
        while process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            if select.select([ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # The other side is closed.
                    written += os.read(ours, 1 << 16)
        assert process.returncode == 0, written
        assert b"Traceback" not in written
        assert b"\x1b[?1049h" in written, "the screen of the shell is kept"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        os.close(ours)
