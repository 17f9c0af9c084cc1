"""Who saves: the log thread, or the loop by itself while nothing waits and syncs are quick."""

from __future__ import annotations

import math
import os
import queue
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from etcdlite import addresses as addresses_module
from etcdlite import threads
from etcdlite.addresses import Addresses
from etcdlite.errors import EtcdError
from etcdlite.handshakes import Handshakes
from etcdlite.lease import Lessor
from etcdlite.metrics import Metrics
from etcdlite.raft import Ready, Snapshot
from etcdlite.raft_log import Entry
from etcdlite.replica.logins import Job
from etcdlite.request import Waiter
from etcdlite.server import STALL_S, Server
from etcdlite.storage import disk as disk_layer
from etcdlite.storage.steps import finish
from etcdlite.threads import (
    ALONE_AGAIN_S,
    FEW_BYTES,
    LONGEST_SYNC_S,
    QUICK_SYNC_S,
    SLOW_SYNC_PAUSE,
    DiskFailed,
    LogThread,
)
from tests.rigs.processes import wait_until


class Log:
    """Stands in for a WAL on a disk whose syncs take `sync_s` on the clock of `threads`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.write_s = 0.0
        self.written_bytes = 0
        self.sync_s = QUICK_SYNC_S / 10
        self.room = 1 << 30
        self.saved: list[Ready] = []
        self.savers: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: OSError | None = None
        self.failed = True
        """After `failure`."""

    def perf_counter(self) -> float:
        return self.now

    def has_room(self, size_bytes: int) -> bool:
        return size_bytes <= self.room

    def save_all(self, saves: list[Ready]) -> None:
        self.gate.wait(60)
        if self.failure:
            raise self.failure
        self.now += self.sync_s
        self.saved += saves
        self.savers.append(threading.get_ident())

    def cover(self, *_: int) -> None:
        self.gate.wait(60)

    def close(self) -> None:
        pass


@pytest.fixture
def log(monkeypatch):
    log = Log()
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=log.perf_counter))
    return log


@pytest.fixture
def thread(log):
    reported = threading.Semaphore(0)
    results: list[list[Ready]] = []

    def done(result: list[Ready]) -> None:
        results.append(result)
        reported.release()

    thread = LogThread(log, Metrics(), done)  # type: ignore[arg-type]
    thread.reported, thread.results = reported, results  # type: ignore[attr-defined]
    yield thread
    log.gate.set()
    log.failure = None
    thread.stop()


def save(index: int = 1, size_bytes: int = 10, snapshot: Any = None) -> list[Ready]:
    return [Ready(None, [Entry(1, index, 0, bytes(size_bytes))], snapshot=snapshot)]


def by_thread(thread, saves: list[Ready]) -> None:
    thread.save(saves)
    assert thread.reported.acquire(timeout=60), "the log thread does not report"
    take_results(thread)


def take_results(thread) -> None:
    while thread.results:
        thread.taken(thread.results.pop(0))


def test_a_small_save_is_done_by_the_caller_while_syncs_are_quick(log, thread):
    for index in range(1, 100):
        assert thread.is_quick(save(index))
        thread.save_now(save(index))
    assert set(log.savers) == {threading.get_ident()}
    assert [one.entries[0].index for one in log.saved] == list(range(1, 100))


def test_one_slow_sync_hands_over_to_the_thread_for_many_times_as_long(log, thread):
    log.sync_s = 0.5
    thread.save_now(save())
    assert not thread.is_quick(save(2))
    log.sync_s = 0.0
    for index in range(2, 200):
        by_thread(thread, save(index))
    assert not thread.is_quick(save(200)), "the average is low again, but the pause is not over"
    log.now += SLOW_SYNC_PAUSE * 0.5
    assert thread.is_quick(save(200))


def test_a_disk_that_is_always_slow_is_left_to_the_thread(log, thread):
    thread.is_alone = True
    log.sync_s = 3 * LONGEST_SYNC_S
    count = 0
    while thread.is_quick(save(count)):
        count += 1
        thread.save_now(save(count))
    assert 0 < count < 16
    for index in range(count + 1, 100):
        by_thread(thread, save(index))
        assert not thread.is_quick(save(index + 1))
    log.sync_s = QUICK_SYNC_S / 10
    for index in range(100, 200):
        by_thread(thread, save(index))
    assert thread.is_quick(save(200)), "it is quick again"


def test_longer_syncs_are_left_to_the_thread_for_a_while_after_a_client_asked_during_one(
    log, thread
):
    thread.is_alone = True
    log.sync_s = 0.8 * LONGEST_SYNC_S
    for index in range(1, 50):
        assert thread.is_quick(save(index)), "nobody waits for anything but these saves"
        thread.save_now(save(index))
    thread.record_request(log.sync_s)
    assert not thread.is_quick(save(50))
    log.now += ALONE_AGAIN_S
    assert thread.is_quick(save(50))


def test_with_other_members_long_syncs_do_not_hold_up_the_heartbeats(log, thread):
    log.sync_s = 0.8 * LONGEST_SYNC_S
    for index in range(1, 50):
        if not thread.is_quick(save(index)):
            break
        thread.save_now(save(index))
    assert 1 < index < 20


def test_quick_syncs_stay_with_the_caller_though_a_client_asked_during_one(log, thread):
    thread.record_request(2 * QUICK_SYNC_S)
    assert thread.is_quick(save())


def test_a_slow_sync_that_nobody_notices_leaves_saves_with_the_caller(log, thread):
    thread.is_alone = True
    log.sync_s = 0.5
    thread.save_now(save())
    assert thread.is_quick(save(2))
    thread.record_request(log.sync_s)
    log.now += 0.9 * SLOW_SYNC_PAUSE * 0.5
    assert not thread.is_quick(save(2)), "a client noticed"


@pytest.mark.parametrize("what", ["save", "release"])
def test_the_caller_does_not_save_while_the_thread_does(log, thread, what):
    log.gate.clear()
    if what == "save":
        thread.save(save())
    else:
        thread.release(1, 1, 1)
    assert not thread.is_quick(save(2))
    log.gate.set()

    def is_quick() -> bool:
        take_results(thread)
        return bool(thread.is_quick(save(2)))

    wait_until(is_quick, "the thread has nothing to do any more")


def test_a_save_does_not_overtake_one_whose_result_is_not_taken_yet(log, thread):
    thread.save(save())
    assert thread.reported.acquire(timeout=60)
    assert not thread.is_quick(save(2)), "it would be reported as durable before the first one"
    take_results(thread)
    assert thread.is_quick(save(2))


def test_large_saves_snapshots_and_new_segments_are_left_to_the_thread(log, thread):
    assert not thread.is_quick(save(1, FEW_BYTES))
    assert not thread.is_quick(save(1, 10, Snapshot(1, 1, (1,), ())))
    log.room = FEW_BYTES
    assert not thread.is_quick(save())


def test_saves_that_replace_each_other_are_left_to_the_thread(log, thread):
    """They take several frames. Without space for the second one, the caller would begin again with
    the first, in its place, and what is left of a longer one would look like damage."""
    assert thread.is_quick([*save(1), *save(2)])
    assert not thread.is_quick([*save(1), *save(2), *save(2)])
    assert not thread.is_quick([*save(3), Ready(None, []), *save(2)])


def test_a_save_of_the_caller_that_fails_ends_the_process(log, thread):
    log.failure = OSError(5, "Input/output error")
    with pytest.raises(DiskFailed, match="Input/output error") as raised:
        thread.save_now(save())
    assert raised.value.__cause__ is log.failure


def test_a_save_of_the_caller_that_finds_no_space_is_left_to_the_thread_which_waits(log, thread):
    log.failure, log.failed = OSError(28, "No space left on device"), False
    saves, server = save(), SimpleNamespace(_log_thread=thread)
    server.member = SimpleNamespace(
        metrics=SimpleNamespace(proposals_pending=0),
        is_applying=False,
        peers=SimpleNamespace(links={}),
    )
    server.connections = SimpleNamespace(have_unread=False)
    save_now = thread.save_now

    def try_to_save(saves: list[Ready]) -> float | None:
        took_s = save_now(saves)
        log.failure = None  # There is space again when the thread tries.
        return took_s

    thread.save_now = try_to_save
    assert not Server._save_now(server, saves)  # type: ignore[arg-type]
    server.member.take_saves = list
    server.member.logins = SimpleNamespace(take=lambda: None)
    Server._give_work(server, saves)  # type: ignore[arg-type]
    assert thread.reported.acquire(timeout=60)
    assert thread.results == [saves] and log.saved == saves


def save_in_loop(log, thread, saves: list[Ready], lessor: Lessor, ready: list[Any]) -> None:
    """What the server does with saves; `ready` is what the selector reports after the sync."""
    calls: list[Any] = []
    member = SimpleNamespace(
        metrics=SimpleNamespace(proposals_pending=0),
        is_applying=False,
        peers=SimpleNamespace(links={}),
        state=SimpleNamespace(lessor=lessor),
        persisted=calls.append,
    )
    connections = SimpleNamespace(
        have_unread=False, are_from_clients=bool, send_output=lambda to_clients: None
    )
    selector = SimpleNamespace(select=lambda timeout_s: ready)
    server = SimpleNamespace(
        member=member, _log_thread=thread, connections=connections, _selector=selector
    )
    server._look_for_stall = lambda now: calls.append("leases")
    assert Server._save_now(server, saves)  # type: ignore[arg-type]
    # A renewal may wait for the save: the leases get the time back before it is answered.
    looks = ["leases"] if log.sync_s > QUICK_SYNC_S else []
    assert calls == [*looks, saves] and log.saved[-len(saves) :] == saves


def test_a_follower_acknowledges_before_it_applies_what_was_committed_before(log, thread):
    calls: list[Any] = []
    saves = [save()]
    member = SimpleNamespace(
        metrics=SimpleNamespace(proposals_pending=0, turn_s=SimpleNamespace(observe=float)),
        hub=SimpleNamespace(tick=float),
        peers=SimpleNamespace(links={2: None}),
        has_urgent_work=True,
        is_applying=False,
        take_saves=lambda: saves.pop() if saves else [],
        persisted=lambda some: calls.append("durable"),
        begin_turn=float,
        proceed=lambda now: calls.append("apply"),
        maintain=lambda has_input: None,
    )
    connections = SimpleNamespace(
        have_work=False,
        have_unread=False,
        serve=lambda ready, began: None,
        send_output=lambda to_clients=True: calls.append("send to all" if to_clients else "send"),
        produce=lambda: None,
    )
    server = SimpleNamespace(
        member=member,
        connections=connections,
        _log_thread=thread,
        _selector=SimpleNamespace(select=lambda timeout_s: []),
        _look_for_stall=lambda now, waited_s=0.0: None,
        _results=[],
        _signal=0,
        _next_tick=math.inf,
        _serves=True,
        _is_ready=True,
        _save_now=lambda saves: Server._save_now(server, saves),  # type: ignore[arg-type]
        _give_work=lambda saves: calls.append(saves),
        _dial_peers=lambda now: None,
        _give_disk_work=lambda: None,
    )
    Server._turn(server)  # type: ignore[arg-type]
    assert calls == ["send", "durable", "send", "apply", [], "send to all"]
    assert len(log.saved) == 1


@pytest.mark.parametrize("waited_s", [0.0, 0.25])
@pytest.mark.parametrize("took_s", [0.01, 3.0])
def test_leases_get_the_time_back_in_which_the_loop_stands_still(took_s, waited_s):
    lessor = Lessor()
    finish(lessor.promote(0.0))
    for lease_id, ttl_s in ((1, 5), (2, 10)):
        lessor.grant(lease_id, ttl_s, 0.0)
    server = SimpleNamespace(
        member=SimpleNamespace(state=SimpleNamespace(lessor=lessor)), _ran_at=math.inf
    )
    Server._look_for_stall(server, 6.0)  # type: ignore[arg-type]
    now = 6.0 + waited_s + took_s
    Server._look_for_stall(server, now, waited_s)  # type: ignore[arg-type]
    expected = 4.0 - waited_s - (took_s if took_s < 1 else 0)
    assert lessor.remaining_s(2, now) == pytest.approx(expected)
    assert lessor.renew(2, now) == 10
    with pytest.raises(EtcdError):
        lessor.renew(1, now)  # It was overdue before: its revoke may be proposed.


def test_the_time_that_it_takes_to_give_leases_time_back_is_no_stall():
    """Else the leases of a member with very many of them never end."""
    given: list[float] = []

    def postpone(since: float, by_s: float) -> None:
        given.append(by_s)
        threading.Event().wait(2 * STALL_S)

    lessor = SimpleNamespace(promoted=True, postpone=postpone)
    member = SimpleNamespace(state=SimpleNamespace(lessor=lessor))
    server = SimpleNamespace(member=member, _ran_at=time.monotonic() - 1)
    for _ in range(3):
        Server._look_for_stall(server, time.monotonic())  # type: ignore[arg-type]
    assert given == [pytest.approx(1, abs=0.5)]
    lessor.promoted = False  # A follower keeps no deadlines.
    Server._look_for_stall(server, time.monotonic() + 10)  # type: ignore[arg-type]
    assert len(given) == 1


@pytest.mark.parametrize("ready", [[], ["a client"]])
def test_a_request_during_a_longer_sync_has_the_thread_do_the_next_ones(log, thread, ready):
    log.sync_s = 0.8 * LONGEST_SYNC_S
    for index in range(1, 20):
        save_in_loop(log, thread, save(index), Lessor(), [])
    save_in_loop(log, thread, save(20), Lessor(), ready)
    assert thread.is_quick(save(21)) is not bool(ready)


# No more threads.


@pytest.fixture
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.usefixtures("without_threads")
def test_without_a_thread_another_member_cannot_be_reached() -> None:
    done: list[Any] = []
    dial: Any = object()
    threads.start_dial(dial, "http://127.0.0.1:1", lambda url, node: None, done.append)
    (dialed,) = done
    assert (dialed.dial, str(dialed.result)) == (dial, "can't start new thread")


@pytest.mark.usefixtures("without_threads")
def test_without_a_thread_a_login_fails() -> None:
    done: list[Any] = []
    results: list[Any] = []
    session: Any = SimpleNamespace(awaits=lambda request_id: True)
    job = Job(Waiter(session, 1, 0, None), lambda: b"hash", results.append)
    threads.start_login(job, done.append)
    assert done == [job]
    job.finish()
    assert "can't start new thread" in results[0].text


@pytest.mark.usefixtures("without_threads")
def test_without_a_thread_a_handshake_fails_and_a_later_one_begins_again() -> None:
    done: list[Any] = []
    handshakes = Handshakes(done.append)
    connection = SimpleNamespace(host="h", is_member=False, is_closed=False, is_abandoned=False)
    for _ in range(2):
        handshakes.step(connection, b"")
    assert [(str(step.failure), step.connection) for step in done] == [
        ("can't start new thread", connection)
    ] * 2


@pytest.mark.usefixtures("without_threads")
def test_without_a_thread_a_name_is_not_known() -> None:
    reported: list[Any] = []
    answers: list[bool] = []
    addresses = Addresses(reported.append)
    addresses.check("10.0.0.1", ["http://name.invalid:2380"], answers.append)
    (resolved,) = reported
    resolved()
    assert answers == [False]


@pytest.mark.usefixtures("without_threads")
def test_without_a_thread_the_kernel_frees_removed_files(tmp_path: Path) -> None:
    eraser = disk_layer._Eraser()
    path = tmp_path / "x"
    path.write_bytes(bytes(3 << 20))
    eraser.remove(str(path), os.unlink, str(path))
    before = len(os.listdir("/proc/self/fd"))
    eraser.synced(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before - 1
    eraser.waiting.join()


# No more memory in a thread. What waits for its result must hear of it.


def test_without_memory_another_member_cannot_be_reached() -> None:
    done: list[Any] = []
    dial: Any = SimpleNamespace(link=SimpleNamespace(failures=0, node=1))

    def dialing(url: str, node: int) -> None:
        raise MemoryError

    reported = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threads.start_dial(dial, url, dialing, lambda it: (done.append(it), reported.set()))
        assert reported.wait(60)
    assert (done[0].dial, str(done[0].result)) == (dial, "MemoryError()")


def test_without_memory_a_name_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(addresses_module.socket, "getaddrinfo", look_up)
    reported: queue.Queue[Any] = queue.Queue()
    answers: list[bool] = []
    addresses = Addresses(reported.put)
    addresses.check("10.0.0.1", ["http://name.invalid:2380"], answers.append)
    reported.get(timeout=60)()
    assert answers == [False]


def test_without_memory_removed_files_are_freed_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    eraser = disk_layer._Eraser()

    def truncate(fd: int, size_bytes: int) -> None:
        raise MemoryError

    monkeypatch.setattr(disk_layer.os, "ftruncate", truncate)
    for _ in range(2):
        path = tmp_path / "x"
        path.write_bytes(bytes(3 << 20))
        eraser.remove(str(path), os.unlink, str(path))
        eraser.synced(str(tmp_path))
        wait_until(lambda: not eraser.waiting.unfinished_tasks, "nobody waits for space any more")
