"""The budget: how many descriptors each kind of flow may have, and how much memory streams may use.

Pure; imports no other room.  All such arithmetic is here.

What one peer holds must not starve the others, so each kind of flow has a share of the descriptors: clients on the
host's network cannot keep the guest from connecting, and the guest cannot keep clients out.  Where a share is used up,
the oldest flow without an answer gives way, or the newest is refused.  Listeners that are opened or closed change the
shares (`Proxy._share_out`).  A share that becomes smaller ends no TCP flow that is established: none is added until
there is room.  UDP flows beyond it give way as others come.
"""

import math
from typing import Final, NamedTuple

RESERVED: Final = 64  # the tap, the loop, the standard streams, files

# Connections that are not established yet: enough for a burst, and few enough to leave room for others
HALF_OPEN_MAX: Final = 1024

# Sixteenths of the descriptors that listeners leave.  A spliced connection has two sockets, and for each direction a
# pipe (two descriptors) while bytes wait in it; both directions rarely have one at once.
OUTBOUND, INBOUND, SPLICED, LINGERING, ENDPOINTS = 5, 3, 5, 1, 1
HALF: Final = 1  # of a sixteenth: spliced UDP, and echo
DESCRIPTORS_PER_SPLICE: Final = 4

# Flows of UDP have no descriptor of their own; each takes about 1 KiB of memory
UDP_FLOWS_MAX: Final = 8192

# A stream holds what was taken from a host socket until the guest has acknowledged it.  Bytes are on the tap for well
# below a millisecond, so a stream of 1 MiB does not bound the rate, and few connections have one at a time.  The more
# streams are in use, the smaller the next ones are: all of them together stay below about four times STREAMS_BYTES.
STREAMS_BYTES: Final = 12 << 20
STREAM_SIZES = (1 << 20, 256 << 10, 64 << 10, 16 << 10, 4 << 10)
WARM_BYTES: Final = 4 << 20  # of unused streams, of each size, that keep their memory


class Budget(NamedTuple):
    """How many of each there may be at a time."""

    listeners: int
    outbound: int
    inbound: int
    spliced: int
    lingering: int
    udp_outbound: int
    udp_inbound: int
    udp_spliced: int
    endpoints: int
    echo: int
    half_open: int = HALF_OPEN_MAX


class RateLimit:
    """A bucket of `burst` tokens, of which `rate` come back each second; `held_back` counts what it has refused."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = self._tokens = burst
        self._rate = rate
        self._at = 0.0
        self.held_back = 0

    def allows(self, now: float) -> bool:
        """Take a token; False if none is left."""
        self._tokens = min(self._burst, self._tokens + max(now - self._at, 0.0) * self._rate)
        self._at = max(now, self._at)
        if self._tokens < 1:
            self.held_back += 1
            return False
        self._tokens -= 1
        return True


def new_flows(rate: int) -> RateLimit:
    """The limit for flows that a guest begins: a second's worth at once, then `rate` a second; 0: no limit."""
    return RateLimit(rate, rate) if rate else RateLimit(math.inf, 0.0)


def share_out(descriptors: int, listeners: int = 0) -> Budget:
    """The budget for a limit of descriptors, of which listeners have `listeners` now."""
    usable = max(descriptors - RESERVED, 16)
    left = max(usable - listeners, 16)

    def part(sixteenths: int) -> int:
        return max(left * sixteenths // 16, 1)

    return Budget(
        listeners=usable * 3 // 4,
        outbound=part(OUTBOUND),
        inbound=part(INBOUND),
        spliced=max(part(SPLICED) // DESCRIPTORS_PER_SPLICE, 1),
        lingering=part(LINGERING),
        udp_outbound=min(left // 2, UDP_FLOWS_MAX),
        udp_inbound=min(left // 2, UDP_FLOWS_MAX),
        udp_spliced=max(part(HALF) // 2, 1),
        endpoints=part(ENDPOINTS),
        echo=min(max(part(HALF) // 2, 1), 1024),
    )


def stream_size(lent: int) -> int:
    """How large the next stream is to be, bytes, while `lent` streams are in use."""
    fair = STREAMS_BYTES // (lent + 1)
    for size in STREAM_SIZES:
        if size <= fair:
            return size
    return STREAM_SIZES[-1]


def warm_streams(size: int) -> int:
    """How many unused streams of a size keep their memory."""
    return max(WARM_BYTES // size, 4)
