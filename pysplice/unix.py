"""UNIX sockets that listen at a path, and a process that takes their files away again.

Owns nothing but that process.  Imports no other room.
"""

# system calls (serve): recvmsg sendto poll ppoll
# system calls (keeper): poll ppoll select pselect6 accept4 getsockopt setsockopt getsockname recvfrom sendto sendmsg
# system calls (keeper): ioctl fcntl socket bind listen connect umask unlink unlinkat lstat newfstatat statx getcwd

import array  # noqa: F401  socket.send_fds() imports it when it is called, and then there may be no file left
import contextlib
import errno
import os
import select
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

BACKLOG = 4096  # the kernel bounds it by net.core.somaxconn
UCRED = struct.Struct("3i")  # process, user, group

MESSAGE_MAX = 4096
TIMEOUT = 2.0  # seconds
PAUSE = 1.0
# What the two processes say to each other: a path behind the first two, an errno behind an answer without a socket
LISTEN, UNLINK, CLIENT = b"l", b"u", b"c"


class UnixListener(NamedTuple):
    """A socket and where it is, so that nothing else is removed in its place."""

    sock: socket.socket
    path: str
    identity: tuple[int, int, int]  # device, inode, and when it was made: inodes are used again

    def unlink(self) -> None:
        """Take its file away if it is still there."""
        with contextlib.suppress(OSError):
            if _identity(self.path) == self.identity:
                os.unlink(self.path)


def listen(path: str) -> UnixListener:
    """A UNIX socket that listens, for our own user alone; one that nobody listens on any more is replaced.

    Raises OSError.
    """
    # In the background the working directory is another one
    path = os.path.abspath(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # Whatever the caller's mask is: to connect takes permission to write
    mask = os.umask(0o177)
    try:
        try:
            sock.bind(path)
        except OSError as e:
            if e.errno != errno.EADDRINUSE or not _abandoned(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(BACKLOG)
        return UnixListener(sock, path, _identity(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)


def _identity(path: str) -> tuple[int, int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _abandoned(path: str) -> bool:
    """True if there is a socket at `path`, and nobody listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def peer_user(sock: socket.socket) -> int:
    """The user at the other end of a UNIX socket (SO_PEERCRED)."""
    return int(UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))[1])


class Keeper:
    """The end that the process that serves has of a connection to the one that keeps socket files.

    The process that serves has no file system, and in its user namespace other users look alike.  So a process of
    its own makes these sockets, takes clients of the one for control, and takes the files away at the end.
    """

    def __init__(self, sock: socket.socket) -> None:
        # socket.recv_fds() of Python 3.11 takes flags and forgets them
        sock.setblocking(False)
        self.sock = sock
        self._clients: deque[socket.socket] = deque()

    def fileno(self) -> int:
        return self.sock.fileno()

    def listen(self, path: str) -> socket.socket:
        """A UNIX socket that listens at a path; raises OSError."""
        self.sock.settimeout(TIMEOUT)
        try:
            self.sock.send(LISTEN + path.encode())
            while True:
                message, fds, _, _ = socket.recv_fds(self.sock, MESSAGE_MAX, 1)
                if message[:1] == CLIENT and fds:
                    self._clients.append(socket.socket(fileno=fds[0]))
                    continue
                if not fds:
                    number = int(message[1:] or errno.EIO)
                    raise OSError(number, os.strerror(number))
                return socket.socket(fileno=fds[0])
        finally:
            self.sock.setblocking(False)

    def unlink(self, path: str) -> None:
        """Take the file of such a socket away."""
        with contextlib.suppress(OSError):
            self.sock.send(UNLINK + path.encode())

    def clients(self) -> Iterator[socket.socket]:
        """Who has connected to the control socket; raises ConnectionError once the other process is gone."""
        while self._clients:
            yield self._clients.popleft()
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self.sock, MESSAGE_MAX, 1)
            except BlockingIOError:
                return
            if not message:
                raise ConnectionError("the process that keeps socket files is gone")
            if fds:
                yield socket.socket(fileno=fds[0])

    def close(self) -> None:
        """The files go; when this returns they have gone, as a rule."""
        self.sock.settimeout(TIMEOUT)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(MESSAGE_MAX):
                pass
        self.sock.close()


def keep(
    alive: socket.socket,
    control: UnixListener | None,
    owner: int,
    allowed: frozenset[str] | None,
    confine: Callable[[], object],
) -> int:
    """Serve a Keeper until its end of `alive` is closed, then remove the files of its sockets.

    Clients of `control` are passed on if they are `owner` or root.  Where the process that asks is another user than
    this one, it gets sockets at the `allowed` paths alone.
    """
    listeners: dict[str, UnixListener] = {}
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    if control is not None:
        poll.register(control.sock, select.POLLIN)
    confine()
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if alive.fileno() in ready:
            try:
                message = alive.recv(MESSAGE_MAX)
            except OSError:
                message = b""
            if not message:
                break
            _obey(alive, message, listeners, allowed)
        if control is not None and control.sock.fileno() in ready:
            try:
                client, _ = control.sock.accept()
            except OSError:
                # There is no descriptor for it: look again in a while, not all the time
                select.select([], [], [], PAUSE)
                continue
            with client, contextlib.suppress(OSError):
                if peer_user(client) in (0, owner):
                    socket.send_fds(alive, [CLIENT], [client.fileno()])
    for listener in listeners.values():
        listener.unlink()
    if control is not None:
        control.unlink()
    return 0


def _obey(
    alive: socket.socket, message: bytes, listeners: dict[str, UnixListener], allowed: frozenset[str] | None
) -> None:
    path = message[1:].decode(errors="surrogateescape")
    if message[:1] == UNLINK:
        listener = listeners.pop(path, None)
        if listener is not None:
            listener.unlink()
        return
    try:
        if allowed is not None and path not in allowed:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        listener = listen(path)
    except OSError as e:
        alive.send(LISTEN + str(e.errno or errno.EIO).encode())
        return
    listeners[path] = listener
    socket.send_fds(alive, [LISTEN], [listener.sock.fileno()])
    listener.sock.close()
