"""The window: how much the guest may still send, and the first window.

Pure functions.  Imports SocketFacts of doors.py.  In what follows, S is the send buffer (SK_MEMINFO_SNDBUF), W what is
charged to it (SK_MEMINFO_WMEM_QUEUED), Q the payload in it (SIOCOUTQ), and m the MSS of the host socket.  S and W are
truesize, as sk_stream_memory_free() compares them: payload plus the sk_buffs that carry it.  Q is payload alone.

An estimator answers one question: how many bytes of payload the socket can still queue.  room() asks the chosen
estimator, and adds what has to hold for all of them: a window that is closed can be opened again.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .doors import SocketFacts

WINDOW_FIELD_MAX: Final = 0xFFFF
SIGNED_WINDOW_MAX: Final = 0x7FFF  # MAX_TCP_WINDOW
WSCALE_MAX: Final = 14  # TCP_MAX_WSCALE; RFC 7323, section 2.3

SNDBUF_SMALL: Final = 128 * 1024
SNDBUF_BIG: Final = 4 * 1024 * 1024
SNDBUF_BIG_PERCENT: Final = 75

# What one segment in a queue costs beyond its payload: an sk_buff, and the room for its headers (measured, Linux 6.18)
SKB_OVERHEAD: Final = 832
SEGMENT: Final = 1448  # an MSS that is not known

# The price of a byte rises a little as a queue grows; this part of the buffer is left for that, 0.2 %
MARGIN_SHIFT: Final = 9


def scaled(buffer: int) -> int:
    """How much payload a send buffer of `buffer` bytes can be expected to hold.

    100 % for a small buffer, 75 % for a big one, linear between; passt uses this where the overhead of sk_buffs
    cannot be seen (clamped_scale() there).
    """
    if buffer <= SNDBUF_SMALL:
        return buffer
    if buffer >= SNDBUF_BIG:
        return buffer * SNDBUF_BIG_PERCENT // 100
    off = (buffer - SNDBUF_SMALL) * (100 - SNDBUF_BIG_PERCENT)
    return buffer - buffer * off // (SNDBUF_BIG - SNDBUF_SMALL) // 100


# The estimators: facts in, bytes of payload out, never below 0


def sndbuf(facts: SocketFacts) -> int:
    """scaled(S) - Q: the rule from before SO_MEMINFO, and for kernels without it.

    From passt (SNDBUF_GET() - SIOCOUTQ in tcp_update_seqack_wnd()).  The overhead is a guess from the size
    of the buffer.  Fails both ways: small segments cost far more than a quarter, so sendmsg() is short;
    large ones cost 2 %, so a quarter of a big buffer is never used.
    """
    return max(scaled(facts.sndbuf) - facts.outq, 0)


def linear(facts: SocketFacts) -> int:
    """(S - W) * Q / W: the free memory, at the price per byte that the queue shows.

    The first proposal for SO_MEMINFO.  Where nothing can be seen (Q = 0, W = 0) there is no ratio, and
    scaled(S) has to serve.  Fails on a nearly empty queue: one small waiting segment shows a price of ten
    times its payload, and the window collapses to a tenth of the buffer just when it should open.
    """
    s, w, q = facts.sndbuf, facts.wmem_queued, facts.outq
    if w < 0:
        return sndbuf(facts)
    if w > s:
        return 0
    if q <= 0 or w <= q:
        return max(scaled(s) - w, 0)
    return (s - w) * q // w


def _segments(facts: SocketFacts, charged: int) -> int:
    """The free memory in whole segments, at the overhead that the queue shows; without one, scaled(S) - `charged`."""
    s, w, q, m = facts.sndbuf, facts.wmem_queued, facts.outq, facts.snd_mss
    if w < 0:
        return sndbuf(facts)
    if w > s:
        return 0
    if q > 0 and w > q and m > 0:
        overhead = (w - q) // max(q // m, 1)
        return (s - w) // (m + overhead) * m
    return max(scaled(s) - charged, 0)


def segments(facts: SocketFacts) -> int:
    """n = max(Q / m, 1) segments cost o = (W - Q) / n each beyond m: floor((S - W) / (m + o)) more fit.

    The second proposal (passt-dev, April 2026, for SO_MEMINFO); falls back to scaled(S) - Q where the overhead
    cannot be seen: an empty queue, or one that drained between the two readings.  One queued segment, however
    small, counts as a whole one, so the window does not collapse as that of `linear`.  Fails in the
    fallback: Q leaves out the overhead, and a young buffer is offered whole, so that the first burst is cut off.
    """
    return _segments(facts, facts.outq)


def segments_wmem(facts: SocketFacts) -> int:
    """As `segments`, but falls back to scaled(S) - W, as the patch's reviewer suggested.

    The memory charged is the kernel's own measure, even where its price per segment cannot be determined.  Fails as
    `segments` at the start, where S is small and W is 0; and rounding gives away up to a segment, although the
    kernel takes a whole sk_buff as long as W is below S.
    """
    return _segments(facts, facts.wmem_queued)


def truesize(facts: SocketFacts) -> int:
    """(S - S / 512 - W) * m / (m + o): the free memory, at the price per segment that the queue shows or may
    come to.

    Ours.  o = (W - Q) / n for n = max(Q / m, 1) segments in the queue, as `segments`; where nothing can be
    seen, an sk_buff for each segment (`SKB_OVERHEAD`), which is what the first segments of a connection cost.
    So a young buffer of 45 KiB can take even the first window, which cannot be taken back.  Parts of
    segments count, because the kernel takes a whole sk_buff while W is below S.  Fails where the first
    segments are much smaller than m: their price shows only once they are queued.
    """
    s, w, q = facts.sndbuf, facts.wmem_queued, facts.outq
    if w < 0:
        return sndbuf(facts)
    if w > s:
        return 0
    m = facts.snd_mss or SEGMENT
    overhead = (w - q) // max(q // m, 1) if w > q > 0 else SKB_OVERHEAD
    return max(s - w - (s >> MARGIN_SHIFT), 0) * m // (m + overhead)


def peer(facts: SocketFacts) -> int:
    """The remote host's window alone (tcpi_snd_wnd): what upstream offers below a low round-trip time.

    It says nothing about the socket in between.  Fails wherever the remote host takes more at a time than the
    send buffer holds; most of all on fast paths, where buffers stay small because they drain at once.  A burst
    of megabytes meets a buffer of 85 KiB, sendmsg() is short, and a proxy that cannot keep the rest has the
    guest send it again.  Without tcpi_snd_wnd, as `sndbuf`.
    """
    return facts.snd_wnd if facts.snd_wnd >= 0 else sndbuf(facts)


Estimator = Callable[[SocketFacts], int]

ESTIMATORS: dict[str, Estimator] = {
    "sndbuf": sndbuf,
    "linear": linear,
    "segments": segments,
    "segments-wmem": segments_wmem,
    "peer": peer,
    "truesize": truesize,
}
DEFAULT_NAME = "truesize"
DEFAULT_ESTIMATOR = ESTIMATORS[DEFAULT_NAME]


# What holds for all estimators


def writable(facts: SocketFacts) -> bool:
    """True if the kernel calls the socket writable: W is at most two thirds of S.

    This is sk_stream_is_writeable(), to the byte: the free space is at least half of what is queued.  If we
    were wrong and asked about a socket that is writable, the answer would come at once, again and again.  Only above
    that limit does epoll report when space comes back, so a window may be closed there and nowhere else.
    """
    queued = facts.outq if facts.wmem_queued < 0 else facts.wmem_queued
    return facts.sndbuf - queued >= queued >> 1


def room(facts: SocketFacts, mss: int, estimate: Estimator = DEFAULT_ESTIMATOR) -> int:
    """Bytes that the guest may send beyond what was read; `mss` is its segment size.

    Silly windows (RFC 813, section 3; RFC 9293, 3.8.6.2.2): a room below one segment counts as 0.  This is done only
    while the socket is not writable, because only then does the kernel tell us when to open the window again.
    While it is writable the room is at least one segment: a sendmsg() may then fall short by less than that, and the
    rest is kept.
    """
    free = estimate(facts)
    if free >= mss:
        return free
    return mss if writable(facts) else 0


def bounds(facts: SocketFacts, mss: int, estimate: Estimator) -> dict[str, Any]:
    """What each estimator makes of one reading, and how the room came about: for the trace and the lab."""
    free = estimate(facts)
    result = room(facts, mss, estimate)
    return {
        "estimates": {name: other(facts) for name, other in ESTIMATORS.items()},
        "estimate": free,
        "room": result,
        "writable": writable(facts),
        "by": "estimate" if result == free else "silly" if result < free else "writable",
    }


# The first window and the scale


class InitialWindow(NamedTuple):
    """What tcp_select_initial_window() chooses: a window (bytes), a scale, and the largest window that it allows."""

    rcv_wnd: int
    rcv_wscale: int
    window_clamp: int


def select_initial_window(
    space: int,
    mss: int,
    window_clamp: int = 0,
    wscale_ok: bool = True,
    rmem_max: int = 0,
    init_rcv_wnd: int = 0,
    signed_windows: bool = False,
) -> InitialWindow:
    """The window of a SYN and its scale, as tcp_select_initial_window() decides (Linux 6.10; before, it
    also bounded rcv_wnd by 65535).

    `space`: bytes that can be held now.  `window_clamp`: no window is ever to be larger, 0 for none (a
    route's `window`).  `rmem_max`: what the space may grow to, bytes; the kernel takes the larger of
    tcp_rmem[2] and net.core.rmem_max.  `init_rcv_wnd`: at most this many segments at first, 0 for no bound (a
    route's `initrwnd`).  `signed_windows`: tcp_workaround_signed_windows, for hosts that take the field for
    a signed number.

    The scale is announced only once and bounds every later window, so it is chosen for the size that the space may
    grow to: the smallest shift that fits that into 16 bits, at most 14.  The window is rounded down to whole segments;
    in the SYN itself, where no scale applies yet, 65535 is the most that can be expressed (RFC 7323, section 2.2): the
    caller sees to that.
    """
    clamp = window_clamp or WINDOW_FIELD_MAX << WSCALE_MAX
    space = min(clamp, max(space, 0))
    if space > mss:
        space -= space % mss
    rcv_wnd = min(space, SIGNED_WINDOW_MAX) if signed_windows else space
    if init_rcv_wnd:
        rcv_wnd = min(rcv_wnd, init_rcv_wnd * mss)
    wscale = 0
    if wscale_ok:
        most = min(max(space, rmem_max), clamp)
        wscale = min(max(most.bit_length() - 16, 0), WSCALE_MAX)
    return InitialWindow(rcv_wnd, wscale, min(WINDOW_FIELD_MAX << wscale, clamp))
