"""Observation: the log file, and the trace of windows."""

import io
import json
import os

import pytest

from pysplice.loop import NEVER
from pysplice.observe.describe import flow_name
from pysplice.observe.log import Clock, LogFile
from pysplice.observe.trace import BUFFER_BYTES, FLUSH_AFTER, WindowTrace

from .support.loops import FakeLoop
from .support.taps import key


def trace(file):
    loop, warnings = FakeLoop(), []
    return WindowTrace(file, loop, warnings.append), loop, warnings


def test_a_line_for_each_window():
    file = io.StringIO()
    traced, loop, _ = trace(file)
    say = traced.of_flow(key(4))
    loop.advance(0.25)
    say({"read": 10, "window": 100})
    loop.advance(FLUSH_AFTER * 0.9)
    assert file.getvalue() == ""
    loop.advance(FLUSH_AFTER * 0.2)
    assert json.loads(file.getvalue()) == {
        "time": 0.25, "flow": flow_name(key(4)), "read": 10, "window": 100, "edge": 110
    }  # fmt: skip
    # Nothing new: nothing to be called for
    traced.flush()
    assert loop.timers.next() == NEVER and file.getvalue().count("\n") == 1


def test_numbers_count_on_where_sequence_numbers_wrap():
    file = io.StringIO()
    traced, _, _ = trace(file)
    say, other = traced.of_flow(key(4)), traced.of_flow(key(6))
    for read in (5, 3 << 30, 1 << 30, 1 << 30):
        say({"read": read, "window": 1})
    other({"read": 7, "window": 1})
    traced.flush()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["read"] for line in lines] == [5, 3 << 30, 5 << 30, 5 << 30, 7]


def test_much_is_written_at_once():
    file = io.StringIO()
    traced, _, _ = trace(file)
    say = traced.of_flow(key(4))
    for _ in range(BUFFER_BYTES // 1000 + 2):
        say({"read": 0, "window": 0, "padding": "x" * 1000})
    assert len(file.getvalue()) > BUFFER_BYTES


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_file_that_cannot_be_written_ends_the_trace():
    traced, _, warnings = trace(Full())
    say = traced.of_flow(key(4))
    for _ in range(3):
        say({"read": 0, "window": 0})
        traced.flush()
    traced.close()
    assert warnings == ["the trace of windows ends: No space left on device"]


@pytest.mark.parametrize("kind", ("device", "pipe"))
def test_a_log_that_cannot_be_shortened(kind):
    """It has no bound; nothing is raised."""
    reader, fd = os.pipe() if kind == "pipe" else (-1, os.open("/dev/null", os.O_RDWR))
    log = LogFile(fd, 4000, "pysplice", Clock(absolute=False))
    for _ in range(100):
        log.write("info:", "x" * 100)
    os.close(fd)
    if kind == "pipe":
        assert os.read(reader, 65536).count(b"\n") == 101
        os.close(reader)


def test_a_log_keeps_its_first_line_and_its_newest(tmp_path):
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    log = LogFile(fd, 4000, "pysplice", Clock(absolute=False))
    for n in range(1000):
        log.write("info:", f"line {n}")
    os.close(fd)
    text = (tmp_path / "log").read_text()
    assert len(text) <= 4000 and text.startswith("pysplice: ") and text.endswith("line 999\n")
