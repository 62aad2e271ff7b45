"""UNIX sockets that listen at a path, and take themselves away again.

Owns nothing; imports no other room.
"""

import contextlib
import errno
import os
import socket
import stat
from typing import NamedTuple

BACKLOG = 4096  # the kernel bounds it by net.core.somaxconn


class UnixListener(NamedTuple):
    """A socket and where it is, so that nothing else is removed in its place."""

    sock: socket.socket
    path: str
    identity: tuple[int, int]  # device and inode

    def remove(self) -> None:
        """Close it, and take its file away if it is still there."""
        self.sock.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self.identity:
                os.unlink(self.path)


def listen(path: str) -> UnixListener:
    """A UNIX socket that listens; one that nobody listens on any more is replaced.  Raises OSError."""
    # In the background the working directory is another one
    path = os.path.abspath(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
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


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


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
