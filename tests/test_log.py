"""The log: what a line looks like, and that logging never harms the one who logs."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import select

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdlite import log

NOW = 1795219200.25  # 2026-11-21T00:00:00.25Z


@pytest.fixture(autouse=True)
def no_lost_lines_to_tell():
    """The next line that gets out tells of those lost before: not those of another test."""
    log.configure(outputs=())
    log.info("gets out")
    log.configure()


@pytest.fixture
def path(tmp_path):
    """A file that the log is written to, in JSON at level debug and at a fixed time; reset after
    the test."""
    name = tmp_path / "log"
    log.configure("debug", "json", [str(name)], clock=lambda: NOW)
    yield name
    log.configure()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def console(path, level="info"):
    log.configure(level, "console", [str(path)], clock=lambda: NOW)


def test_a_json_line_has_the_field_names_of_etcd(path):
    log.info("ready to serve client requests", address="127.0.0.1:2379", took_ms=3)
    (line,) = lines(path)
    assert list(line) == ["level", "ts", "caller", "msg", "address", "took-ms"]
    assert line["level"] == "info"
    assert line["ts"] == "2026-11-21T00:00:00.250Z"
    assert line["caller"].startswith("tests/test_log.py:")
    assert line["msg"] == "ready to serve client requests"
    assert (line["address"], line["took-ms"]) == ("127.0.0.1:2379", 3)


def test_a_console_line_is_for_humans(path):
    console(path)
    log.warn("slow disk", path="/a b", took_ms=12, note="", who=None, ids=[1, 2])
    assert path.read_text() == (
        '2026-11-21T00:00:00.250Z WARN  slow disk  path="/a b"  took-ms=12  note=""  who=null  '
        'ids="[1, 2]"\n'
    )


def test_a_console_line_names_the_caller_only_at_level_debug(path):
    console(path)
    log.info("hello")
    console(path, "debug")
    log.info("hello")
    first, second = path.read_text().splitlines()
    assert "test_log.py" not in first
    assert "(tests/test_log.py:" in second


def test_levels_below_the_chosen_one_are_left_out(path):
    log.configure("warn", "json", [str(path)])
    for write in (log.debug, log.info, log.warn, log.error, log.fatal):
        write("x")
    assert [line["level"] for line in lines(path)] == ["warn", "error", "fatal"]


def test_a_field_may_have_any_name(path):
    log.info("real", **{"msg": 1, "level": 2, "message": 3, "a b\n": 4})
    (line,) = lines(path)
    assert (line["msg"], line["msg-"], line["level"], line["level-"]) == ("real", 1, "info", 2)
    assert (line["message"], line["a b\n"]) == (3, 4)


@pytest.mark.parametrize("format", log.FORMATS)
def test_a_value_cannot_forge_a_line_or_move_the_cursor(path, format):
    log.configure("debug", format, [str(path)])
    hostile = "a\nb\rc\x1b[2Jd\x9be\x7f\u2028\udc80\x00"
    log.info(hostile, value=hostile, key=hostile.encode("utf-8", "replace"), **{hostile: hostile})
    text = path.read_text()
    assert text.count("\n") == 1 and text[:-1].isprintable()


@pytest.mark.parametrize("format", log.FORMATS)
def test_secrets_are_not_written(path, format):
    log.configure("debug", format, [str(path)])
    log.info("x", password="hunter2", authToken=b"hunter2", conf={"root-Password": "hunter2"})
    text = path.read_text()
    assert "hunter2" not in text and text.count("<redacted>") == 3


class Colour(enum.IntEnum):
    RED = 1


def test_values_of_every_kind_are_shown(path):
    shown = {
        "b": (b"k\xff", "k\\xff"),
        "e": (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        "n": (ValueError(), "ValueError"),
        "f": (float("nan"), "nan"),
        "g": (1.5, 1.5),
        "t": ((1, "a"), [1, "a"]),
        "d": ({1: b"x"}, {"1": "x"}),
        "c": (Colour.RED, 1),
        "o": (bool, "<class 'bool'>"),
    }
    log.info("x", **{name: value for name, (value, _) in shown.items()})
    (line,) = lines(path)
    assert {name: line[name] for name in shown} == {name: text for name, (_, text) in shown.items()}


class Hostile:
    def __str__(self):
        raise RuntimeError("no")


def test_what_cannot_be_shown_costs_the_line_and_not_the_caller(path):
    lost = log.lost_lines()
    log.info("x", value=Hostile())
    log.info("y")
    assert log.lost_lines() == lost + 1
    (line,) = lines(path)
    assert (line["msg"], line["lost-lines"]) == ("y", 1)


@pytest.mark.parametrize("format", log.FORMATS)
@pytest.mark.parametrize(
    "fields",
    [
        {"stack": "head " + "\n" * 100_000 + " tail"},
        {"a": "\U0001f600" * 5000, "b": b"\xff" * 5000},
        {"items": list(range(100_000)), "map": {i: i for i in range(100_000)}},
        {f"field{i}": "x" * 1000 for i in range(1000)},
    ],
)
def test_a_line_is_never_longer_than_a_pipe_takes_in_one_piece(path, format, fields):
    log.configure("debug", format, [str(path)])
    log.info("x" * 100_000, **fields)
    data = path.read_bytes()
    assert len(data) <= log.MAX_LINE_BYTES == select.PIPE_BUF
    if format == "json":
        assert json.loads(data)["msg"].startswith("xxx")
    if "stack" in fields:
        assert b"head" in data and b"tail" in data


def test_nesting_without_end_is_cut(path):
    loop: list[object] = []
    loop.append(loop)
    log.info("x", loop=loop)
    assert lines(path)[0]["loop"] == [[[["..."]]]]


@contextlib.contextmanager
def stderr_as_pipe():
    """The read end of a pipe that stands in for stderr. (Not a fixture: pytest's own capture is put
    in place between a fixture and its test.)"""
    saved = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield reader
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        with contextlib.suppress(OSError):
            os.close(reader)
        log.configure()


def test_a_file_that_is_closed_is_no_output_any_more(path, monkeypatch):
    """Another thread may log at any moment, and the next file that is opened, perhaps one with
    data, gets the number of the closed one."""
    close = os.close

    def closed(fd):
        close(fd)
        assert fd not in log._outputs

    monkeypatch.setattr(os, "close", closed)
    log.configure(outputs=[str(path)])


def test_a_full_pipe_loses_lines_without_waiting_and_the_next_line_says_how_many():
    with stderr_as_pipe() as reader:
        log.configure(clock=lambda: NOW)
        lost = log.lost_lines()
        for _ in range(2000):
            log.info("x" * 1000)
        assert log.lost_lines() > lost, "a pipe cannot hold 2 MB"
        while select.select([reader], [], [], 0)[0]:
            os.read(reader, 1 << 20)
        lost = log.lost_lines() - lost
        log.info("after")
        log.info("later")
        after, later = os.read(reader, 1 << 16).splitlines()
        assert after.endswith(b"INFO  after  lost-lines=%d" % lost)
        assert later.endswith(b"INFO  later")


def test_a_reader_that_is_gone_and_a_closed_stderr_are_survived():
    lost = log.lost_lines()
    with stderr_as_pipe() as reader:
        os.close(reader)
        log.configure()
        log.info("to nobody")
        os.close(2)
        log.info("to nothing")
        log.configure()
        log.info("to nothing")
    assert log.lost_lines() == lost + 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_survived_and_the_other_outputs_are_served(path):
    log.configure("info", "json", ["/dev/full", str(path)])
    lost = log.lost_lines()
    log.info("x")
    assert log.lost_lines() == lost + 1
    assert lines(path)[0]["msg"] == "x"


def test_under_journald_the_priority_stands_in_place_of_time_and_level(monkeypatch):
    with stderr_as_pipe() as reader:
        status = os.fstat(2)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.configure()
        log.info("started", name="a")
        log.error("oh")
        assert os.read(reader, 4096) == b"<6>started  name=a\n<3>oh\n"


def test_a_file_that_cannot_be_opened_changes_nothing(path):
    with pytest.raises(OSError):
        log.configure("fatal", "console", [str(path.parent / "x"), "/nonexistent/log"])
    with pytest.raises(ValueError):
        log.configure(format="xml")
    log.debug("still json")
    assert lines(path)[0]["msg"] == "still json"


def test_repeated_lines_can_be_limited(tmp_path):
    now = 1000.0
    log.configure(outputs=(), clock=lambda: now)
    try:
        assert not log.limited("a", per_s=2)
        assert log.limited("a", per_s=2)
        assert not log.limited("b", per_s=2)
        now += 0.5
        assert not log.limited("a", per_s=2)
        now -= 3600
        assert not log.limited("a", per_s=2), "a clock that was set back must not silence the log"
        for key in range(3 * log.MAX_LIMITED_KEYS):
            log.limited(f"key {key}")
        assert len(log._limited_until) <= log.MAX_LIMITED_KEYS
    finally:
        log.configure()


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.text(), st.dictionaries(st.text(), VALUES, max_size=5))
def test_any_event_is_one_line_that_parses(message, fields):
    reader, writer = os.pipe()
    try:
        for format in log.FORMATS:
            log.configure("debug", format, [f"/dev/fd/{writer}"], clock=lambda: NOW)
            log.info(message, **fields)
            line = os.read(reader, 1 << 16)
            assert line.endswith(b"\n") and line.decode()[:-1].isprintable()
            assert len(line) <= log.MAX_LINE_BYTES
            if format == "json":
                assert isinstance(json.loads(line), dict)
    finally:
        log.configure()
        os.close(reader)
        os.close(writer)
