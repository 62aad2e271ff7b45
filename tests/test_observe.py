"""Observation: the trace of windows."""

import io
import json

from pysplice.loop import NEVER
from pysplice.observe.trace import BUFFER_BYTES, FLUSH_AFTER, WindowTrace

from .support.loops import FakeLoop


def trace(file):
    loop, warnings = FakeLoop(), []
    return WindowTrace(file, loop, warnings.append), loop, warnings


def test_a_line_for_each_window():
    file = io.StringIO()
    traced, loop, _ = trace(file)
    say = traced.of_flow("a -> b")
    loop.advance(0.25)
    say({"read": 10, "window": 100})
    loop.advance(FLUSH_AFTER * 0.9)
    assert file.getvalue() == ""
    loop.advance(FLUSH_AFTER * 0.2)
    assert json.loads(file.getvalue()) == {
        "time": 0.25, "flow": "a -> b", "read": 10, "window": 100, "edge": 110
    }  # fmt: skip
    # Nothing new: nothing to be called for
    traced.flush()
    assert loop.timers.next() == NEVER and file.getvalue().count("\n") == 1


def test_numbers_count_on_where_sequence_numbers_wrap():
    file = io.StringIO()
    traced, _, _ = trace(file)
    say, other = traced.of_flow("a"), traced.of_flow("b")
    for read in (5, 3 << 30, 1 << 30, 1 << 30):
        say({"read": read, "window": 1})
    other({"read": 7, "window": 1})
    traced.flush()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["read"] for line in lines] == [5, 3 << 30, 5 << 30, 5 << 30, 7]


def test_much_is_written_at_once():
    file = io.StringIO()
    traced, _, _ = trace(file)
    say = traced.of_flow("x" * 1000)
    for _ in range(BUFFER_BYTES // 1000 + 2):
        say({"read": 0, "window": 0})
    assert len(file.getvalue()) > BUFFER_BYTES


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_file_that_cannot_be_written_ends_the_trace():
    traced, _, warnings = trace(Full())
    say = traced.of_flow("a")
    for _ in range(3):
        say({"read": 0, "window": 0})
        traced.flush()
    traced.close()
    assert warnings == ["the trace of windows ends: No space left on device"]
