"""Host sockets whose connection has ended for the guest, until the remote host has what was acknowledged.

Owns these sockets and the bytes that are kept for them.  Imports `loop`.

Closing such a socket is not enough.  A kernel resets a connection that is closed with unread input or gets more
input later (tcp_close(), tcp_rcv_state_process()), and then drops what is queued; and it gives up a closed socket
whose peer does not open its window for some minutes (tcp_probe_timer()).  So the descriptor stays open until nothing
is queued, and input is discarded.  No event reports when a queue has become empty, so we look at it at growing
intervals.
"""

# system calls (serve): recvfrom ioctl setsockopt shutdown

import contextlib
import errno
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable
from typing import Final, Protocol

from ..loop import NEVER, Loop

LOOK_FIRST, LOOK_MOST = 0.05, 5.0  # seconds between two looks at a queue
PATIENCE: Final = 60.0  # seconds without progress, for a socket that ends with a reset
DISCARD_BYTES, DISCARD_ROUNDS = 65536, 16  # of input, for each event

ABORT = struct.pack("ii", 1, 0)  # struct linger: a close() that resets


class Kept(Protocol):
    """Bytes that the socket has not taken yet (_cext.Stream)."""

    def __len__(self) -> int: ...
    def send(self, fd: int, /) -> int: ...


def reset_on_close(sock: socket.socket) -> None:
    """Arrange for the peer to see a reset when the socket is closed."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a reset."""
    reset_on_close(sock)
    sock.close()


def unsent(sock: socket.socket) -> int:
    """How many bytes the peer's kernel has not acknowledged (SIOCOUTQ); a FIN counts as one."""
    if sock.family == socket.AF_UNIX:
        return 0  # what was written is already in the peer's queue
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
    except OSError:
        return 0


class Lingering:
    """One such socket: `kept` (or None) goes out first, then the peer sees the end, or a reset if `with_reset`."""

    __slots__ = ("at", "kept", "left", "moved_at", "shut", "sock", "wait", "with_reset")

    def __init__(self, sock: socket.socket, kept: Kept | None, with_reset: bool) -> None:
        self.sock = sock
        self.kept = kept
        self.with_reset = with_reset
        self.shut = False
        self.left = -1  # bytes at the last look
        self.wait = LOOK_FIRST
        self.at = 0.0  # when to look next
        self.moved_at = NEVER  # when the peer took something last


class Lingerers:
    """All of these sockets.

    `epoll` watches them; `arm(fd)` has it report writability once.  There are at most `most`: beyond that the oldest is
    closed, and the kernel has to finish it alone.
    """

    def __init__(self, epoll: select.epoll, most: int, arm: Callable[[int], None], loop: Loop) -> None:
        self._epoll = epoll
        self._arm = arm
        self.most = most
        self._loop = loop
        self._timer = loop.timer(self._look)
        self._by_fd: dict[int, Lingering] = {}

    def __len__(self) -> int:
        return len(self._by_fd)

    @property
    def kept(self) -> int:
        """How many bytes no kernel has yet."""
        return sum(len(lingering.kept) for lingering in self._by_fd.values() if lingering.kept is not None)

    def add(self, lingering: Lingering) -> None:
        """Take over a socket."""
        if len(self._by_fd) >= self.most:
            handed = (fd for fd, other in self._by_fd.items() if other.kept is None)
            self._close(next(handed, next(iter(self._by_fd))))
        fd = lingering.sock.fileno()
        self._by_fd[fd] = lingering
        self._timer.by(self._loop.now())
        self._go_on(fd, lingering)

    def on_ready(self, fd: int, ready: int) -> None:
        """One of these sockets is ready; `ready`: the bits of epoll(7)."""
        lingering = self._by_fd.get(fd)
        if lingering is None:
            return
        if ready & (select.EPOLLERR | select.EPOLLHUP):
            error = lingering.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error or ready & select.EPOLLHUP:
                self._close(fd)
                return
        self._go_on(fd, lingering)

    def _go_on(self, fd: int, lingering: Lingering) -> None:
        """Discard input, pass on what is kept, and then the end."""
        sock = lingering.sock
        try:
            for _ in range(DISCARD_ROUNDS):
                if len(sock.recv(DISCARD_BYTES)) < DISCARD_BYTES:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self._close(fd)
            return
        if lingering.kept is not None:
            sent = lingering.kept.send(fd)
            if sent < 0 and sent != -errno.EAGAIN:
                self._close(fd)
                return
            if len(lingering.kept):
                self._arm(fd)
                return
            lingering.kept = None
        if not lingering.with_reset and not lingering.shut:
            lingering.shut = True
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        if unsent(sock) <= lingering.shut:
            self._close(fd)

    def _look(self) -> None:
        """Look at the queues that are due."""
        now = self._loop.now()
        for fd, lingering in [pair for pair in self._by_fd.items() if pair[1].at <= now]:
            self._go_on(fd, lingering)
            if fd not in self._by_fd:
                continue
            left = unsent(lingering.sock) + (len(lingering.kept) if lingering.kept is not None else 0)
            if left != lingering.left:
                lingering.left, lingering.moved_at = left, now
                lingering.wait = LOOK_FIRST
            elif lingering.with_reset and now - lingering.moved_at >= PATIENCE:
                self._close(fd)
                continue
            lingering.at = now + lingering.wait
            lingering.wait = min(2 * lingering.wait, LOOK_MOST)
        self._timer.by(min((lingering.at for lingering in self._by_fd.values()), default=NEVER))

    def _close(self, fd: int) -> None:
        lingering = self._by_fd.pop(fd)
        if lingering.with_reset or lingering.kept is not None:
            # The peer must not mistake what it has got for all of the data
            reset(lingering.sock)
        else:
            lingering.sock.close()

    def close(self) -> None:
        """Give all of them back: the kernel goes on with what is queued."""
        for fd in list(self._by_fd):
            self._close(fd)
