"""Random histories of one connection: a seed decides all that guest, remote host, link, kernel and clock do.

Beside what model.py has (loss, repetition, any sizes) there are: resets by either side, a guest that is gone, forged
segments, a tap that refuses, a send buffer that shrinks, throttling by the small queue, a clock that jumps, silence,
connect() that fails, and connections that come from the host.  After every step these hold:

- what the remote host has and will get is the beginning of what the guest sent: once, and in order;
- what was acknowledged to the guest is with the host's kernel or kept, unless the remote host has refused it;
- what the guest has got is the beginning of what the remote host sent;
- the right edge never moves left (check_edge());
- facts are learnt by the table alone (IllegalTransition), and no door is used after its end (the fakes);
- something will happen: a connection that waits for the guest has a deadline.

When the faults stop, the connection ends.
"""

import errno
import random

from pysplice.tcp import seq
from pysplice.tcp.connection import Connection, Terms
from pysplice.tcp.doors import ACK, ERROR, FIN, PSH, RST, SYN, WRITABLE
from pysplice.tcp.events import CLOSED, ESTABLISHED, SOCK_CONNECTED
from pysplice.tcp.small_queue import SmallQueue
from pysplice.tcp.timing import NEVER

from .model import World

FAULTY_STEPS = 60
FAIR_STEPS = 4000
FAULTS = (
    "forge", "tap_down", "tap_up", "shrink", "grow", "resume", "jump", "silence", "guest_reset", "remote_reset",
    "guest_gone", "starve",
)  # fmt: skip
# How often each of these comes in a step, at most; the seed chooses which come at all
RATES = (0.0, 0.0, 0.02, 0.2)


class History(World):
    """One history; play() raises AssertionError, or IllegalTransition, where something does not hold."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        up, down = (rng.randbytes(rng.choice((0, 1, 100, 3000, 20_000))) for _ in range(2))
        super().__init__(seed, up, down, rng.choice((0.0, 0.0, 0.1, 0.4)), rng.choice((0.0, 0.3)))
        self.choices = random.Random(seed + 1)
        self.rates = {name: self.choices.choice(RATES) for name in FAULTS}
        for rare in ("guest_reset", "remote_reset", "guest_gone"):
            self.rates[rare] *= 0.1
        self.gone = self.refused = False
        self.acked = 0  # bytes of the guest's stream that were acknowledged
        queue = SmallQueue(limit=self.choices.choice((0, 0, 3000)))
        self.queue = queue
        inbound = self.choices.random() < 0.3
        self.host.closed, self.host.outbox = "", bytearray()
        self.tap.take()
        self.edge = None
        self.connection = Connection(
            self.tap, self.host, None if inbound else self.guest.syn(),
            Terms(self.choices.choice((0, 0xFFFFFF80, self.choices.getrandbits(32))), self.guest.mss, queue), self.now,
        )  # fmt: skip
        self.inbound = inbound
        if inbound:
            self.connection.open(self.now)
        elif self.choices.random() < 0.05:
            self.host.connect_error = errno.ECONNREFUSED
            self.connection.on_host(ERROR, self.now)
        else:
            self.connection.on_host(WRITABLE, self.now)

    def play(self) -> None:
        for _ in range(FAULTY_STEPS):
            if self.connection.facts & CLOSED:
                break
            for name in FAULTS:
                if self.choices.random() < self.rates[name] and not self.connection.facts & CLOSED:
                    getattr(self, name)()
                    self.check()
            self.turn()
        # From here on nothing goes wrong any more
        self.tap.down = False
        self.loss = self.repeat = 0.0
        self.host.sndbuf = max(self.host.sndbuf, 30_000)
        for _ in range(FAIR_STEPS):
            if self.connection.facts & CLOSED:
                break
            self.resume()
            self.turn()
            # A guest that is gone, or has been reset and forgot, is found out by time alone
            if self.gone or self.guest.reset or self.choices.random() < 0.02:
                self.now = max(self.now, min(self.connection.deadline(), self.now + 200))
        assert self.connection.facts & CLOSED, "it waits for ever"
        self.check()
        assert self.host.closed, "the host socket was left open"
        if self.host.closed == "aborted" and not self.refused:
            assert not self.acked_but_not_sent(), "an abort threw acknowledged bytes away"

    def acked_but_not_sent(self) -> int:
        return max(self.acked - len(self.host.wire), 0)

    def turn(self) -> None:
        if self.gone:
            self.guest.out.clear()
        self.answer_syn()
        self.step()
        self.check()

    def answer_syn(self) -> None:
        """A guest that is asked for a connection agrees, as often as it is asked."""
        if self.inbound and not self.connection.facts & (ESTABLISHED | CLOSED) and not self.gone:
            first = self.connection.send.seq_ack_from_tap
            guest = self.guest
            guest.irs_seen, guest.rcv_nxt = True, seq.add(first, 1)
            guest.scale = max(self.connection.receive.ws_to_tap, 0) if guest.wscale >= 0 else 0
            run = guest.syn()
            run.flags, run.ack = SYN | ACK, guest.rcv_nxt
            self.connection.on_tap(self.host.offer(run), self.now)
            if guest.edge is None:
                guest.edge = self.connection.receive.wnd_edge

    def step(self) -> None:
        if self.gone:
            act, self.guest.act = self.guest.act, lambda now: None  # type: ignore[method-assign]
            try:
                super().step()
            finally:
                self.guest.act = act  # type: ignore[method-assign]
            self.guest.out.clear()
        else:
            super().step()

    def check_edge(self, segments):
        for segment in segments:
            if segment.flags & ACK and not segment.flags & RST and self.connection.facts:
                at = seq.diff(segment.ack, seq.add(self.guest.iss, 1))
                if 0 <= at <= len(self.up) + 1:
                    self.acked = max(self.acked, min(at, len(self.up)))
        # A SYN of ours acknowledges nothing, so it has no edge yet
        super().check_edge([segment for segment in segments if segment.flags & ACK])

    def check(self) -> None:
        host, connection = self.host, self.connection
        sent = bytes(host.wire + host.outbox + host.kept)
        assert self.up.startswith(sent), "the remote host gets other bytes than the guest sent"
        assert self.down.startswith(self.guest.received), (
            "the guest gets other bytes than the remote host sent"
        )
        if not self.refused:
            assert self.acked <= len(sent), "acknowledged, and nowhere"
        if not connection.facts & CLOSED and connection.facts & SOCK_CONNECTED:
            assert connection.deadline() != NEVER, "nothing will ever happen"

    # What goes wrong

    def forge(self) -> None:
        """A segment that the guest's kernel has not sent; a RST that is exact counts, so there is none."""
        pick = self.choices
        near = pick.choice((self.guest.nxt, self.connection.receive.seq_from_tap, pick.getrandbits(32)))
        flags = pick.choice((SYN, ACK, SYN | ACK, RST, 0, FIN, ACK | PSH, FIN | ACK))
        number = seq.add(near, pick.choice((-70_000, -1, 1, 5, 100_000, 1 << 30)))
        if flags & RST and number == self.connection.receive.seq_from_tap:
            return
        is_bare = flags & (FIN | SYN) or (flags & ACK and not flags & PSH)
        payload = b"" if is_bare else b"forged"
        # What is in the window is the guest's own word: only what lies outside can be another's
        inside = (
            -6
            <= seq.diff(number, self.connection.receive.seq_from_tap)
            <= self.connection.receive.room_left()
        )
        if inside and not flags & (RST | SYN):
            return
        if flags & SYN and not self.connection.facts & ESTABLISHED:
            return  # the guest itself has given up then
        run = type(self.guest.syn())(number, self.connection.send.seq_ack_from_tap, 100, flags, payload)
        self.connection.on_tap(self.host.offer(run), self.now)

    def tap_down(self) -> None:
        self.tap.down = True

    def tap_up(self) -> None:
        self.tap.down = False

    def shrink(self) -> None:
        """Memory pressure: the kernel takes less than before."""
        self.host.sndbuf = max(self.host.sndbuf // 2, 2000)

    def grow(self) -> None:
        self.host.sndbuf = min(self.host.sndbuf * 2, 1 << 22)

    def starve(self) -> None:
        self.queue.budget = 0 if self.queue.budget else self.choices.choice((1, 1000))

    def resume(self) -> None:
        for connection in list(self.queue.throttled):
            del self.queue.throttled[connection]
            connection.resume()

    def jump(self) -> None:
        """The machine was asleep."""
        self.now += self.choices.choice((1, 100, 10_000))

    def silence(self) -> None:
        """Nobody says anything until the next deadline."""
        deadline = self.connection.deadline()
        if deadline != NEVER:
            self.now = max(self.now, deadline)
            self.connection.on_timer(self.now)

    def guest_reset(self) -> None:
        run = type(self.guest.syn())(self.connection.receive.seq_from_tap, 0, 0, RST)
        self.gone = True
        self.connection.on_tap(self.host.offer(run), self.now)

    def guest_gone(self) -> None:
        self.gone = True

    def remote_reset(self) -> None:
        self.host.failure = errno.ECONNRESET
        self.host.connect_error = errno.ECONNRESET
        self.refused = True
        self.connection.on_host(ERROR, self.now)


def play(seed: int) -> str:
    """What does not hold in the history of a seed; empty if all does."""
    try:
        History(seed).play()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""
