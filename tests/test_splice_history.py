"""Random histories of a spliced connection: a seed decides who sends, reads, ends and resets, and how much at a time.

After every step what an end has read is the beginning of what the other has sent.  At the end, where nobody has reset
or closed early, all of it has arrived; in any case no splice and no descriptor is left.
"""

import contextlib
import os
import random
import select
import socket
import struct
import time

import pytest

from pysplice.splice.streams import SplicedStreams

from .support.loops import FakeLoop

COUNT = 150
STEPS = 60
IDLE_TURNS = 100
PATIENCE = 60.0  # seconds; the kernel's own timers are among what is waited for
RESET = struct.pack("ii", 1, 0)


class End:
    """One end of the connection: what it has sent and read."""

    def __init__(self, sock: socket.socket, rng: random.Random) -> None:
        sock.setblocking(False)
        self.sock, self.rng = sock, rng
        self.sent, self.got = bytearray(), bytearray()
        self.is_shut = self.is_closed = self.has_ended = self.was_reset = False

    def act(self) -> None:
        """One thing that a process may do with its socket."""
        kind = self.rng.choices(("send", "read", "shut", "close", "reset"), (10, 10, 1, 0.2, 0.2))[0]
        if self.is_closed:
            return
        try:
            if kind == "send" and not self.is_shut:
                data = self.rng.randbytes(self.rng.choice((1, 100, 5000, 300_000)))
                self.sent += data[: self.sock.send(data)]
            elif kind == "read":
                self.read(self.rng.choice((1, 1000, 100_000)))
            elif kind == "shut" and not self.is_shut:
                self.sock.shutdown(socket.SHUT_WR)
                self.is_shut = True
            elif kind in ("close", "reset"):
                if kind == "reset":
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                self.sock.close()
                self.is_closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.was_reset = True

    def read(self, most: int) -> None:
        data = self.sock.recv(most)
        self.got += data
        self.has_ended |= not data


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def play(seed: int) -> None:
    rng = random.Random(seed)
    before = descriptors()
    with contextlib.ExitStack() as stack:
        outer, inner = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        if rng.random() < 0.5:
            for listener in (outer, inner):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        epoll = stack.enter_context(select.epoll())
        splices = SplicedStreams(epoll, FakeLoop())
        stack.callback(splices.close)
        client = stack.enter_context(socket.create_connection(outer.getsockname()))
        accepted, _ = outer.accept()
        accepted.setblocking(False)
        between = socket.socket()
        between.setblocking(False)
        splices.start(accepted, between, inner.getsockname())
        server, _ = inner.accept()
        stack.enter_context(server)
        ends = End(client, rng), End(server, rng)

        def turn(wait: float = 0) -> None:
            splices.on_ready(epoll.poll(wait))
            for one, other in (ends, ends[::-1]):
                assert other.sent.startswith(one.got)

        for _ in range(STEPS):
            rng.choice(ends).act()
            if rng.random() < 0.5:
                turn()
        harmed = any(end.is_closed or end.was_reset for end in ends)
        for end in ends:
            if not end.is_closed and not end.is_shut:
                with contextlib.suppress(OSError):
                    end.sock.shutdown(socket.SHUT_WR)

        def moved() -> int:
            return sum(len(end.got) for end in ends)

        until, idle = time.monotonic() + PATIENCE, 0
        while time.monotonic() < until:
            seen = moved()
            for end in ends:
                if not (end.is_closed or end.has_ended or end.was_reset):
                    try:
                        end.read(1 << 20)
                    except BlockingIOError:
                        pass
                    except OSError:
                        end.was_reset = True
            idle = 0 if moved() > seen else idle + 1
            turn(0.001 if idle > IDLE_TURNS else 0)
            if not len(splices) and all(end.is_closed or end.has_ended or end.was_reset for end in ends):
                break
        assert not len(splices), "a splice is left"
        if not harmed:
            for one, other in (ends, ends[::-1]):
                assert one.got == other.sent and one.has_ended and not one.was_reset
    assert descriptors() == before


@pytest.mark.parametrize("part", range(3))
def test_histories_of_a_splice(part):
    for seed in range(part * COUNT, (part + 1) * COUNT):
        try:
            play(seed)
        except AssertionError as e:
            raise AssertionError(f"seed {seed}") from e


@pytest.mark.pure
def test_the_histories_notice(monkeypatch):
    """Bytes that are left in a pipe, and an end that is not passed on."""
    real = os.splice

    def short(src, dst, count, *args, **kwargs):
        return real(src, dst, count, *args, **kwargs) if count < 3000 else min(count, 10)

    monkeypatch.setattr(os, "splice", short)
    monkeypatch.setitem(globals(), "PATIENCE", 1.0)
    with pytest.raises(AssertionError):
        test_histories_of_a_splice(0)
