"""Descriptors, and the files that are written.

Owns nothing.  Imports `config`.
"""

import errno
import os
import resource
import stat
from typing import TextIO

from ..config import ConfigError

FD_MAX = 2**31 - 1
FILES_NEEDED = 40  # descriptors: with fewer, nothing works
LINKS_MAX = 8


def close_leaked(keep: int) -> None:
    """Close what the caller has left open above stderr, except `keep`, and open any of 0 to 2 that it has closed."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    close_but(keep)


def close_but(*keep: int) -> None:
    """Close all descriptors above stderr but these; those below 3 do not count."""
    first = 3
    for fd in sorted({fd for fd in keep if fd > 2}):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, FD_MAX)


def check_limit() -> None:
    """Raises ConfigError if the limit of descriptors is too low for anything to work."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES_NEEDED:
        raise ConfigError(f"{hard} descriptors are too few, {FILES_NEEDED} are needed (ulimit -n)")


def raise_limit() -> int:
    """Raise the limit of descriptors to the hard limit; returns that limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _open(path: str, flags: int) -> int:
    """Open a file for writing, empty and for its owner alone; raises ConfigError.

    A link is followed if it belongs to this user or to root.  In a directory that other users can write to, another
    user's link may lead to a file that this user may write and the other may not (fs.protected_symlinks says the same,
    where it is on).  The descriptor never blocks: not now for the reader of a FIFO, and not later.
    """
    flags |= os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
    at = path
    try:
        for _ in range(LINKS_MAX):
            try:
                return os.open(at, flags, 0o600)
            except OSError as e:
                if e.errno != errno.ELOOP:
                    raise
            link = os.open(at, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(link)
                if not stat.S_ISLNK(found.st_mode):
                    continue  # it has just been replaced
                if os.path.realpath(os.path.dirname(at)) == f"/proc/{os.getpid()}/fd":
                    # /dev/stdout and its like: a file that the caller has opened
                    return os.open(at, flags & ~os.O_NOFOLLOW)
                if found.st_uid not in (0, os.geteuid()):
                    raise ConfigError(f"cannot write {path}: it is a link of another user's")
                at = os.path.join(os.path.dirname(at), os.readlink("", dir_fd=link))
            finally:
                os.close(link)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from None


def open_pid_file(path: str) -> int:
    """Open the file for the process ID; raises ConfigError."""
    return _open(path, os.O_WRONLY)


def open_trace(path: str) -> TextIO:
    """Open the file for the trace of windows; raises ConfigError."""
    return os.fdopen(_open(path, os.O_WRONLY), "w", encoding="ascii")


def open_output(path: str) -> int:
    """Open a file for a log or a capture; raises ConfigError."""
    return _open(path, os.O_RDWR)


def write_pid_file(fd: int, pid: int) -> None:
    """Write the process ID, and close the file; raises ConfigError."""
    try:
        os.write(fd, f"{pid}\n".encode())
        os.close(fd)
    except OSError as e:
        raise ConfigError(f"cannot write the process ID: {e.strerror}") from None
