"""How long to wait for the guest: round trips and the retransmission timeout (RFC 6298), keepalives, challenges.

Owns the estimate of one connection.  Imports seq.py; it knows nothing about segments except their numbers.
"""

from typing import Final

from . import seq

NEVER: Final = float("inf")

# The bounds are Linux's TCP_TIMEOUT_INIT, TCP_RTO_MIN and TCP_RTO_MAX
RTO_INITIAL: Final = 1.0
RTO_MIN: Final = 0.2
RTO_MAX: Final = 120.0
BACKOFF_MAX: Final = 16

# Seconds between two challenges of a connection (Linux: tcp_invalid_ratelimit)
CHALLENGE_INTERVAL: Final = 0.5

# A guest that has been silent for this long is asked for a sign of life (passt: KEEPALIVE_INTERVAL), seconds.  The
# time is rounded up to whole ticks, so that many idle connections share one wake-up.
KEEPALIVE_IDLE: Final = 30.0
KEEPALIVE_TICK: Final = 10.0


class RoundTrip:
    """The estimate: `srtt` and `rttvar` in seconds; `backoff`: how many time-outs there were in a row.

    One segment at a time is timed, and none that was sent twice (Karn's algorithm, section 3).
    """

    __slots__ = ("_sent_at", "_seq", "backoff", "rto", "rttvar", "srtt")

    def __init__(self) -> None:
        self.srtt = self.rttvar = 0.0
        self.rto = RTO_INITIAL
        self.backoff = 0
        self._seq = -1
        self._sent_at = 0.0

    def sent(self, end: int, now: float) -> None:
        """Data up to the sequence number `end` went out for the first time."""
        if self._seq < 0:
            self._seq, self._sent_at = end, now

    def resent(self) -> None:
        """Something was sent again: an acknowledgement no longer tells which of the two it is for."""
        self._seq = -1

    def acknowledged(self, ack: int, now: float) -> None:
        """Everything up to `ack` has arrived."""
        self.backoff = 0
        if self._seq < 0 or seq.diff(ack, self._seq) < 0:
            return
        self._seq = -1
        rtt = now - self._sent_at
        if self.srtt:
            self.rttvar += (abs(self.srtt - rtt) - self.rttvar) / 4
            self.srtt += (rtt - self.srtt) / 8
        else:
            self.srtt, self.rttvar = rtt, rtt / 2
        rto = self.srtt + 4 * self.rttvar
        self.rto = RTO_MIN if rto < RTO_MIN else min(rto, RTO_MAX)

    def expired(self) -> None:
        """No acknowledgement has come in time: wait twice as long (section 5.5)."""
        self.backoff = min(self.backoff + 1, BACKOFF_MAX)

    def timeout(self) -> float:
        """Seconds to wait from now on."""
        return min(self.rto * (1 << self.backoff), RTO_MAX)


class Challenges:
    """When a segment that a peer in step with us would not have sent may be answered.

    Not always: two ends that are out of step would answer each other for ever (RFC 5961, section 7).
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = -NEVER

    def may_be(self, now: float) -> bool:
        """True if the answer may go out; it counts as sent."""
        if now - self._last < CHALLENGE_INTERVAL:
            return False
        self._last = now
        return True


def keepalive_at(quiet_since: float) -> float:
    """When to probe a guest that was last heard, or probed, at `quiet_since`."""
    at = quiet_since + KEEPALIVE_IDLE
    return at + -at % KEEPALIVE_TICK
