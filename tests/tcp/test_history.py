"""Random histories of one connection; `tests/histories tcp COUNT` plays as many as wanted."""

from pathlib import Path

import pytest

from pysplice.tcp.connection import Connection
from pysplice.tcp.receive import Receive
from pysplice.tcp.send import Send

from .history import play

COUNT = 3000
KEPT = [
    int(line) for line in (Path(__file__).parent / "seeds.txt").read_text().splitlines() if line[0] != "#"
]


def failures(count):
    return {seed: problem for seed in range(count) if (problem := play(seed))}


def test_histories():
    assert failures(COUNT) == {}


@pytest.mark.parametrize("seed", KEPT)
def test_a_history_that_failed_once(seed):
    assert play(seed) == ""


# What breaks the protocol, and what the histories say then


def loses_kept_bytes(monkeypatch):
    original = Receive.flush

    def flush(self):
        if self.kept:
            del self._host.kept[0:1]
            self._host.kept += b"?"
        return original(self)

    monkeypatch.setattr(Receive, "flush", flush)


def moves_the_edge_left(monkeypatch):
    original = Receive.advertise
    monkeypatch.setattr(Receive, "advertise", lambda self, room, left: original(self, room, left) // 2)


def acknowledges_too_much(monkeypatch):
    original = Receive.take

    def take(self, run, offset):
        error = original(self, run, offset)
        self.seq_from_tap = (self.seq_from_tap + 1) & 0xFFFFFFFF
        return error

    monkeypatch.setattr(Receive, "take", take)


def sends_the_wrong_bytes(monkeypatch):
    original = Send.expired
    monkeypatch.setattr(Send, "expired", lambda self: (self._host.stream.reverse(), original(self))[1])


def never_retransmits(monkeypatch):
    monkeypatch.setattr(Connection, "_timeout", lambda self, now: None)


def aborts_instead_of_closing(monkeypatch):
    monkeypatch.setattr(Connection, "_leave_host", Connection._abort_host)


@pytest.mark.pure
@pytest.mark.parametrize(
    "breakage",
    (
        loses_kept_bytes,
        moves_the_edge_left,
        acknowledges_too_much,
        sends_the_wrong_bytes,
        never_retransmits,
        aborts_instead_of_closing,
    ),
)
def test_the_histories_notice(monkeypatch, breakage):
    breakage(monkeypatch)
    assert any(play(seed) for seed in range(600))
