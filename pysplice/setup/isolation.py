"""Giving up what is not needed, and going to the background.

Owns nothing.  Imports config.py.
"""

import ctypes
import os
import resource
import struct
from typing import TextIO

from ..config import ConfigError

PR_SET_NO_NEW_PRIVS = 38
PR_CAPBSET_DROP = 24
CAP_LAST = 63
CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def close_leaked(keep: int | None) -> None:
    """Close what the caller left open above stderr, and fill what it closed below."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    top = 2**31 - 1
    if keep is None:
        os.closerange(3, top)
    else:
        os.closerange(3, keep)
        os.closerange(keep + 1, top)


def raise_file_limit() -> int:
    """As many descriptors as we may have; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def drop_privileges() -> None:
    """No capability, and no way to one: the tap and the listeners are open by now."""
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(CAP_LAST + 1):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    _libc.capset(header, data)


def open_pid_file(path: str) -> int:
    """Open the file for our process ID before anything is given up; raises ConfigError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from None


def open_trace(path: str) -> TextIO:
    """Open the file for the trace of windows; raises ConfigError.

    It never blocks: not now for the reader of a FIFO, and not later.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(path, flags, 0o644), "w", encoding="ascii")
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from None


def write_pid_file(fd: int, pid: int) -> None:
    os.write(fd, f"{pid}\n".encode())
    os.close(fd)


def to_background() -> int:
    """Fork: returns in the child, with the descriptor by which it says that all is well.

    The parent ends with status 0 when the child has written to it, 1 if it dies before.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writable)
        ready = os.read(readable, 1)
        os._exit(0 if ready else 1)
    os.close(readable)
    os.setsid()
    return writable


def leave_terminal(ready_fd: int) -> None:
    """In the background: release stdin, stdout and stderr, and let the parent go."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    os.write(ready_fd, b"1")
    os.close(ready_fd)
