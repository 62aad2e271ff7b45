"""UNIX sockets that listen at a path, and the process that keeps their files.

Owns that process.  Imports request.py.

The process that serves has no file system, and in its user namespace it cannot tell one user from another.  So another
process, the keeper, makes these sockets, accepts clients of the control socket, and removes the files at the end.
"""

# system calls (serve): recvmsg sendto poll ppoll
# system calls (keeper): poll ppoll select pselect6 accept4 getsockopt setsockopt getsockname recvfrom sendto sendmsg
# system calls (keeper): ioctl fcntl socket bind listen connect umask unlink unlinkat lstat newfstatat statx getcwd

import array  # noqa: F401  socket.send_fds() imports it when it is called, and by then the process has no files
import contextlib
import errno
import os
import select
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from .request import BACKLOG

UCRED = struct.Struct("3i")  # process, user, group

MESSAGE_MAX = 4096
TIMEOUT = 2.0  # seconds
PAUSE = 1.0
# The first byte of a message between the two processes.  A path follows LISTEN and UNLINK, the name of a control
# socket follows CLIENT.  An answer to LISTEN has the path again, or an errno and the path.
LISTEN, UNLINK, CLIENT = b"l", b"u", b"c"

# The names of the control sockets: of `pysplice ctl` (--control), and of pesto(1) (-c)
REQUESTS, UPDATES = "requests", "updates"


class UnixListener(NamedTuple):
    """A listening socket, its path, and which file that was, so that no other file is removed in its place."""

    sock: socket.socket
    path: str
    identity: tuple[int, int, int]  # device, inode, and time of the last change: inode numbers are reused

    def unlink(self) -> None:
        """Remove the file, if it is still the same one."""
        with contextlib.suppress(OSError):
            if _identity(self.path) == self.identity:
                os.unlink(self.path)


def listen(path: str) -> UnixListener:
    """A UNIX socket that listens, for its owner alone; raises OSError.

    A socket at this path on which no process listens any more is replaced.
    """
    # In the background the working directory is another one
    path = os.path.abspath(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # Connecting requires write permission
    mask = os.umask(0o177)
    try:
        try:
            sock.bind(path)
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise
            if not _is_socket(path):
                raise FileExistsError(errno.EEXIST, "a file that is not a socket is there") from None
            if not _is_abandoned(path):
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


def _is_socket(path: str) -> bool:
    """True if there is a socket at `path`."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_abandoned(path: str) -> bool:
    """True if no process listens on the socket at `path`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def peer_user(sock: socket.socket) -> int:
    """The user ID of the process at the other end of a UNIX socket (SO_PEERCRED)."""
    return int(UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))[1])


class SocketFiles(Protocol):
    """What the serving process asks of the keeper."""

    def fileno(self) -> int:
        """The descriptor that is readable when a client has come; -1: there is none."""

    def listen(self, path: str) -> socket.socket:
        """A UNIX socket that listens at a path; raises OSError."""

    def unlink(self, path: str) -> None:
        """Remove the file of such a socket."""

    def clients(self) -> Iterator[tuple[str, socket.socket]]:
        """Clients that have come, and the control socket of each; raises ConnectionError once the keeper is gone."""

    def close(self) -> None:
        """Remove all files."""


class NoFiles:
    """The SocketFiles of a run that has none."""

    def fileno(self) -> int:
        return -1

    def listen(self, path: str) -> socket.socket:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def unlink(self, path: str) -> None:
        pass

    def clients(self) -> Iterator[tuple[str, socket.socket]]:
        return iter(())

    def close(self) -> None:
        pass


class Keeper:
    """The SocketFiles that the keeper provides, over the socket `sock`."""

    def __init__(self, sock: socket.socket) -> None:
        # socket.recv_fds() of Python 3.11 takes flags and ignores them
        sock.setblocking(False)
        self._sock = sock
        self._clients: deque[tuple[str, socket.socket]] = deque()

    def fileno(self) -> int:
        return self._sock.fileno()

    def listen(self, path: str) -> socket.socket:
        self._sock.settimeout(TIMEOUT)
        try:
            self._sock.send(LISTEN + os.fsencode(path))
            while True:
                message, fds, _, _ = socket.recv_fds(self._sock, MESSAGE_MAX, 1)
                if message[:1] == CLIENT and fds:
                    self._clients.append((message[1:].decode(), socket.socket(fileno=fds[0])))
                    continue
                if not message:
                    raise OSError(errno.EPIPE, "the process that keeps socket files is gone")
                number, _, answered = message[1:].partition(b" ")
                if answered != os.fsencode(path):
                    # Of a question that was given up
                    self._take_back(answered, fds)
                    continue
                if not fds:
                    reason = "a file that is not a socket is there" if int(number) == errno.EEXIST else None
                    raise OSError(int(number), reason or os.strerror(int(number)))
                return socket.socket(fileno=fds[0])
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        finally:
            self._sock.setblocking(False)

    def _take_back(self, path: bytes, fds: list[int]) -> None:
        """Close a socket that comes too late, and have its file removed."""
        for fd in fds:
            os.close(fd)
        self.unlink(os.fsdecode(path))

    def unlink(self, path: str) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(UNLINK + os.fsencode(path))

    def clients(self) -> Iterator[tuple[str, socket.socket]]:
        while self._clients:
            yield self._clients.popleft()
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._sock, MESSAGE_MAX, 1)
            except BlockingIOError:
                return
            if not message:
                raise ConnectionError("the process that keeps socket files is gone")
            if message[:1] != CLIENT:
                self._take_back(message[1:].partition(b" ")[2], fds)
            elif fds:
                yield message[1:].decode(), socket.socket(fileno=fds[0])

    def close(self) -> None:
        """Have the files removed; when this returns they are gone, unless the keeper is slow."""
        self._sock.settimeout(TIMEOUT)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(MESSAGE_MAX):
                pass
        self._sock.close()


def keep(
    alive: socket.socket,
    controls: Mapping[str, UnixListener],
    owner: int,
    allowed: frozenset[str] | None,
    confine: Callable[[], object],
) -> int:
    """Serve a Keeper until its end of `alive` is closed, then remove the files; the exit status.

    Clients of `controls`, by name, are passed on if their user is `owner` or root.  Unless `allowed` is None, sockets
    are made at these paths alone: then the process that asks runs as another user than this one.  `confine` is called
    before anything is read.
    """
    listeners: dict[str, UnixListener] = {}
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    for control in controls.values():
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
        for name, control in controls.items():
            if control.sock.fileno() not in ready:
                continue
            try:
                client, _ = control.sock.accept()
            except OSError:
                # There is no descriptor for it: look again in a while, not all the time
                select.select([], [], [], PAUSE)
                continue
            with client, contextlib.suppress(OSError):
                if peer_user(client) in (0, owner):
                    socket.send_fds(alive, [CLIENT + name.encode()], [client.fileno()])
    for listener in listeners.values():
        listener.unlink()
    for control in controls.values():
        control.unlink()
    return 0


def _obey(
    alive: socket.socket, message: bytes, listeners: dict[str, UnixListener], allowed: frozenset[str] | None
) -> None:
    """One message of the serving process."""
    path = os.fsdecode(message[1:])
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
        alive.send(b"%b%d %b" % (LISTEN, e.errno or errno.EIO, os.fsencode(path)))
        return
    listeners[path] = listener
    socket.send_fds(alive, [b"%b0 %b" % (LISTEN, os.fsencode(path))], [listener.sock.fileno()])
    listener.sock.close()
