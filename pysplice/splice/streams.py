"""Spliced connections: from one socket to another, without the tap.

Owns the sockets and pipes of its connections.  Imports `loop` and one function of `stream`.

splice(2) moves bytes from a socket into a pipe, and from there into the other socket: the kernel moves pages, and none
of the data enters this process.  A pipe is borrowed while it holds something.  Each direction ends by itself
(shutdown(2)); an error of one socket resets the other.

Readiness is reported by edges, so a direction is pumped until the source is empty or the target is full.  A
connection that never gets there gives way to the others after a few rounds, and goes on in the next turn.
"""

# system calls (serve): splice pipe2 fcntl write recvfrom getpeername

import contextlib
import errno
import fcntl
import os
import select
import socket
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from ..loop import Loop
from ..stream.linger import reset_on_close

EVENTS: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
PIPE_BYTES: Final = 1 << 20  # the most that an ordinary user may have (fs.pipe-max-size)
POOL_PIPES: Final = 32
# Bytes: a pipe has a slot for each page of its size, and a slot may hold as little as one byte
SLOT: Final = os.sysconf("SC_PAGE_SIZE")
ROUNDS: Final = 8  # pipes full of data before the other connections have their turn
SPLICE_FLAGS: Final = 0x01 | 0x02  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK

READABLE: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
ENDS: Final = READABLE & ~select.EPOLLIN

CONNECTING, OPEN, CLOSED = range(3)


class Pipe(NamedTuple):
    """The two ends of a pipe, and how many slots it has."""

    reader: int
    writer: int
    slots: int


def _close_pipe(pipe: Pipe) -> None:
    os.close(pipe.reader)
    os.close(pipe.writer)


class Direction:
    """From one socket to the other.

    `held` is how many bytes are in the pipe, `moved` how many have passed.  `ended`: the source has no more.  `shut`:
    the target was told so.  `urgent`: the source has urgent data, in front of which splice(2) stops.  `readable`: the
    source may have something; `short_read_ends`: a read that leaves slots of the pipe free has emptied it.
    """

    __slots__ = (
        "ended", "failed", "held", "moved", "pipe", "readable", "short_read_ends", "shut", "source", "target", "urgent",
    )  # fmt: skip

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.urgent = False
        self.failed = False
        self.target = target
        self.pipe: Pipe | None = None
        self.readable = False
        # In front of a descriptor that is passed a read stops, too
        self.short_read_ends = source.family != socket.AF_UNIX
        self.held = 0
        self.moved = 0
        self.ended = False
        self.shut = False


class Splice:
    """Two sockets: `client` was accepted, `server` connects.  `from_guest`: the client is in the namespace."""

    __slots__ = ("broken", "client", "directions", "from_guest", "name", "server", "state")

    def __init__(self, client: socket.socket, server: socket.socket, name: str, from_guest: bool) -> None:
        self.from_guest = from_guest
        self.client = client
        self.server = server
        self.name = name
        self.state = CONNECTING
        self.broken: Direction | None = None  # the one whose source has an error
        self.directions = (Direction(client, server), Direction(server, client))


class SplicedStreams:
    """All spliced connections; `epoll` watches their sockets."""

    def __init__(self, epoll: select.epoll, loop: Loop) -> None:
        self._epoll = epoll
        self._loop = loop
        self.opened = 0
        self._moved = [0, 0]  # bytes of connections that have ended: from the guest, to the guest
        self._by_fd: dict[int, Splice] = {}
        self._pipes: list[Pipe] = []
        self._unfinished: dict[Splice, None] = {}
        self._go_on = loop.timer(lambda: self.on_ready(()))

    def __len__(self) -> int:
        return len(self._by_fd) // 2

    def all(self) -> list[Splice]:
        """All connections."""
        return list(dict.fromkeys(self._by_fd.values()))

    def bytes_moved(self) -> tuple[int, int]:
        """How many bytes have gone from the guest to the host, and back, in all connections so far."""
        from_guest, to_guest = self._moved
        for splice in self.all():
            from_guest += splice.directions[not splice.from_guest].moved
            to_guest += splice.directions[splice.from_guest].moved
        return from_guest, to_guest

    def undelivered(self) -> list[tuple[int, int]]:
        """For each connection whose guest has not ended: identity, and how many of the guest's bytes have passed."""
        waiting = ((splice, splice.directions[not splice.from_guest]) for splice in self.all())
        return [(id(splice), direction.moved) for splice, direction in waiting if not direction.shut]

    def start(
        self,
        client: socket.socket,
        server: socket.socket,
        address: Any,
        name: str = "",
        from_guest: bool = False,
    ) -> None:
        """Connect `server` to `address`, and splice it and `client`; if that fails the client is reset.

        `name` is for the log; `from_guest`: the client is in the namespace, and the server on the host.
        """
        splice = Splice(client, server, name, from_guest)
        for sock in (client, server):
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._by_fd[sock.fileno()] = splice
        self.opened += 1
        try:
            error = server.connect_ex(address)
        except OSError as e:
            error = e.errno or errno.EIO
        if error not in (0, errno.EINPROGRESS):
            self._abort(splice)
            return
        self._epoll.register(client.fileno(), EVENTS)
        self._epoll.register(server.fileno(), EVENTS)

    def on_ready(self, ready_sockets: Iterable[tuple[int, int]]) -> None:
        """Some sockets are ready (descriptor, and bits of epoll(7)), or a connection is to go on."""
        waiting = self._unfinished
        self._unfinished = {}
        for fd, ready in ready_sockets:
            splice = self._by_fd.get(fd)
            if splice is None:
                continue
            mine = splice.directions[fd != splice.client.fileno()]
            if ready & READABLE:
                mine.readable = True
            if ready & ENDS:
                mine.short_read_ends = False
            if ready & select.EPOLLPRI:
                # It is reported once, perhaps before there is a server to pass it on to
                mine.urgent = True
            if splice.state == CONNECTING:
                self._look(splice, fd)
            elif ready & select.EPOLLERR:
                splice.broken = mine
            waiting[splice] = None
        for splice in waiting:
            if splice.state == OPEN:
                self._pump(splice)
        if self._unfinished:
            self._go_on.by(self._loop.now())

    def _look(self, splice: Splice, fd: int) -> None:
        """A socket has an error, or the outcome of connect() is known."""
        sock = splice.client if fd == splice.client.fileno() else splice.server
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._abort(splice)
        elif sock is splice.server and splice.state == CONNECTING:
            with contextlib.suppress(OSError):
                sock.getpeername()
                splice.state = OPEN

    def _pump(self, splice: Splice) -> None:
        """Move what there is.  Data that came before a socket's error goes on first, then both are reset."""
        directions = splice.directions
        if splice.broken is directions[1]:
            directions = directions[::-1]
        unfinished = False
        for direction in directions:
            if direction.failed:
                continue
            try:
                unfinished |= self._move(direction, splice)
            except OSError:
                direction.failed = True
        if splice.broken is not None and splice.broken.shut:
            # It had ended before, so no read will report its error
            splice.broken.failed = True
        if any(direction.failed for direction in directions):
            if unfinished:
                self._unfinished[splice] = None
            elif not any(direction.held and not direction.failed for direction in directions):
                self._abort(splice)
        elif all(direction.shut for direction in directions):
            self._close(splice)
        elif unfinished:
            self._unfinished[splice] = None

    def _read(self, direction: Direction, pipe: Pipe) -> int:
        """Fill the pipe; how many bytes, 0 at the end.  Raises BlockingIOError if there are none yet."""
        try:
            n = os.splice(direction.source.fileno(), pipe.writer, PIPE_BYTES, flags=SPLICE_FLAGS)
        except BlockingIOError:
            if not direction.urgent:
                raise
            n = 0
        if n:
            if n < pipe.slots and direction.short_read_ends:
                direction.readable = False
            return n
        # The end, or an urgent byte.  In front of an urgent byte splice(2) reports nothing to read, or the end if a FIN
        # came behind it (tcp_splice_read()).  The byte goes on in the stream, as with SO_OOBINLINE everywhere.
        direction.urgent = False
        return os.write(pipe.writer, direction.source.recv(1))

    def _move(self, direction: Direction, splice: Splice) -> bool:
        """Move what there is; True if there may be more at once.  Raises OSError if a socket is broken."""
        if direction.shut or not (direction.readable or direction.held):
            return False
        pipe = direction.pipe = direction.pipe or self._borrow()
        for _ in range(ROUNDS):
            if not direction.held:
                if direction.ended:
                    break
                try:
                    n = self._read(direction, pipe) if direction.readable else -1
                except BlockingIOError:
                    direction.readable = False
                    n = -1
                if n < 0:
                    self._give_back(direction)
                    return False
                direction.held = n
                direction.ended = n == 0
                if not n:
                    break
            try:
                n = os.splice(pipe.reader, direction.target.fileno(), direction.held, flags=SPLICE_FLAGS)
            except BlockingIOError:
                return False
            direction.held -= n
            direction.moved += n
        else:
            if direction.held or direction.readable or direction.ended:
                return True
            self._give_back(direction)
            return False
        self._give_back(direction)
        # After a failure what looks like the end is not one
        if not any(other.failed for other in splice.directions):
            direction.target.shutdown(socket.SHUT_WR)
        direction.shut = True
        return False

    def _borrow(self) -> Pipe:
        if self._pipes:
            return self._pipes.pop()
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        size = 0
        # Above fs.pipe-user-pages-soft an ordinary user gets smaller pipes
        with contextlib.suppress(OSError):
            size = fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return Pipe(reader, writer, size // SLOT)

    def _give_back(self, direction: Direction) -> None:
        pipe, direction.pipe = direction.pipe, None
        if pipe is None:
            return
        if direction.held or len(self._pipes) >= POOL_PIPES:
            _close_pipe(pipe)
        else:
            self._pipes.append(pipe)

    def _close(self, splice: Splice) -> None:
        splice.state = CLOSED
        for n, direction in enumerate(splice.directions):
            self._give_back(direction)
            self._moved[n != (not splice.from_guest)] += direction.moved
        for sock in (splice.client, splice.server):
            del self._by_fd[sock.fileno()]
            sock.close()

    def _abort(self, splice: Splice) -> None:
        """Reset both ends."""
        if splice.state == CLOSED:
            return
        for sock in (splice.client, splice.server):
            reset_on_close(sock)
        self._close(splice)

    def close(self) -> None:
        """End all connections; those that are not finished are reset."""
        for splice in self.all():
            if splice.directions[0].shut and splice.directions[1].shut:
                self._close(splice)
            else:
                self._abort(splice)
        for pipe in self._pipes:
            _close_pipe(pipe)
