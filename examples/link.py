#!/usr/bin/env python3
"""A link between two network namespaces, with delay, loss, reordering and a rate.

    link.py --a NETNS:DEVICE --b NETNS:DEVICE [--delay MS] [--jitter MS] [--loss PERCENT] [--reorder PERCENT]
            [--duplicate PERCENT] [--corrupt PERCENT] [--rate MBIT] [--mtu BYTES] [--queue FRAMES] [--control]

Netem does this in the kernel where there is netem; this does it everywhere.  It makes a tap in each
namespace and carries frames between the two, with one queue of release times for each direction.  NETNS is
a path or a name in /run/netns.  Prints "ready" when both devices are up, and runs until it is ended.  With
--control a line "NAME VALUE" on stdin changes one of these while it runs ("loss 10"), and stdin's end ends it.

Offloads stay on, with the virtio header passed through, as long as a frame may be anything; with anything but a
delay, and with --control, they are off, so that what is lost is a segment and not 64 KiB.
"""

import argparse
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import time
from collections import deque

CLONE_NEWNET = 0x40000000
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
OFFLOADS = 0x0F  # checksum, TSO4, TSO6, ECN
FRAME_MAX = 66000
IMPAIRMENTS = ("delay", "jitter", "loss", "reorder", "duplicate", "corrupt", "rate")
REORDER_DELAY = 0.002  # how much later a reordered frame is, seconds

libc = ctypes.CDLL(None, use_errno=True)


def namespace_path(name: str) -> str:
    return name if "/" in name else f"/run/netns/{name}"


def enter(path: str) -> None:
    """Move this process into a network namespace."""
    fd = os.open(path, os.O_RDONLY)
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    os.close(fd)


def open_tap(namespace: str, device: str, offload: bool, mtu: int) -> int:
    enter(namespace_path(namespace))
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if offload else 0)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    if offload:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 10))
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
    link = ["ip", "link", "set", device]
    subprocess.run([*link, "mtu", str(mtu), "txqueuelen", "20000", "up"], check=True)
    return fd


class Direction:
    """Frames from one tap to the other, in the order of their release."""

    def __init__(self, source: int, sink: int, args: argparse.Namespace, seed: int) -> None:
        self.source, self.sink = source, sink
        for name in IMPAIRMENTS:
            self.set(name, getattr(args, name))
        self.limit = args.queue
        self.random = random.Random(seed)
        self.line_free = 0.0
        self.queue: deque[tuple[float, bytes]] = deque()
        self.late: list[tuple[float, int, bytes]] = []
        self.count = self.dropped = 0

    def set(self, name: str, value: float) -> None:
        """Change one impairment; milliseconds, percent, Mbit/s."""
        if name == "rate":
            self.byte_time = 8 / (value * 1e6) if value else 0.0
        else:
            setattr(self, name, value / (1000 if name in ("delay", "jitter") else 100))

    def take(self, now: float) -> None:
        """Read what there is, and say when it is due."""
        for _ in range(64):
            try:
                frame = os.read(self.source, FRAME_MAX)
            except BlockingIOError:
                return
            if self.loss and self.random.random() < self.loss:
                self.dropped += 1
                continue
            if self.corrupt and self.random.random() < self.corrupt:
                at = self.random.randrange(14, len(frame))
                frame = frame[:at] + bytes([frame[at] ^ 1 << self.random.randrange(8)]) + frame[at + 1 :]
            due = now + self.delay
            if self.byte_time:
                # A queue before the line, as a router has it
                if len(self.queue) >= self.limit:
                    self.dropped += 1
                    continue
                self.line_free = max(now, self.line_free) + len(frame) * self.byte_time
                due = self.line_free + self.delay
            if self.duplicate and self.random.random() < self.duplicate:
                self._later(due + REORDER_DELAY, frame)
            if self.jitter:
                self._later(due + self.random.random() * self.jitter, frame)
            elif self.reorder and self.random.random() < self.reorder:
                self._later(due + REORDER_DELAY, frame)
            else:
                self.queue.append((due, frame))

    def _later(self, due: float, frame: bytes) -> None:
        self.count += 1
        heapq.heappush(self.late, (due, self.count, frame))

    def give(self, now: float) -> float:
        """Write what is due; when the next frame is."""
        queue, sink = self.queue, self.sink
        while queue and queue[0][0] <= now:
            try:
                os.write(sink, queue.popleft()[1])
            except OSError:
                self.dropped += 1
        while self.late and self.late[0][0] <= now:
            try:
                os.write(sink, heapq.heappop(self.late)[2])
            except OSError:
                self.dropped += 1
        first = queue[0][0] if queue else float("inf")
        return min(first, self.late[0][0]) if self.late else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for end in ("--a", "--b"):
        parser.add_argument(end, required=True, metavar="NETNS:DEVICE")
    parser.add_argument("--delay", type=float, default=0, help="each way, milliseconds")
    parser.add_argument(
        "--jitter", type=float, default=0, help="up to so much more for each frame, milliseconds"
    )
    for name in ("loss", "reorder", "duplicate", "corrupt"):
        parser.add_argument(f"--{name}", type=float, default=0, help="percent")
    parser.add_argument("--rate", type=float, default=0, help="Mbit/s, 0: none")
    parser.add_argument("--queue", type=int, default=1000, help="frames before a line with a rate")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--control", action="store_true", help="obey lines on stdin")
    args = parser.parse_args()

    offload = not args.control and not any(getattr(args, name) for name in IMPAIRMENTS if name != "delay")
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    taps = []
    for end in (args.a, args.b):
        namespace, device = end.rsplit(":", 1)
        taps.append(open_tap(namespace, device, offload, args.mtu))
        if libc.setns(home, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    a, b = taps
    forth, back = Direction(a, b, args, 1), Direction(b, a, args, 2)
    print("ready", flush=True)

    watched = [*taps, 0] if args.control else taps
    while True:
        now = time.monotonic()
        due = min(forth.give(now), back.give(now))
        timeout = None if due == float("inf") else max(due - time.monotonic(), 0)
        readable, _, _ = select.select(watched, (), (), timeout)
        now = time.monotonic()
        if a in readable:
            forth.take(now)
        if b in readable:
            back.take(now)
        if 0 in readable:
            lines = os.read(0, 1000).decode().splitlines()
            if not lines:
                return
            for name, value in map(str.split, lines):
                for direction in (forth, back):
                    direction.set(name, float(value))


if __name__ == "__main__":
    main()
