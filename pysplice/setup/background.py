"""Leaving the terminal.

Owns nothing; imports no other room.
"""

import os


def to_background() -> tuple[int, int]:
    """Fork, and return in the child: a descriptor on which it reports that all is well, and its process ID.

    The process ID is the one that the parent sees.  The parent exits with status 0 when the child has written to the
    descriptor, and with 1 if the child dies before.
    """
    readable, writable = os.pipe()
    number_in, number_out = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writable)
        os.close(number_in)
        os.write(number_out, str(pid).encode())
        ready = os.read(readable, 1)
        os._exit(0 if ready else 1)
    os.close(readable)
    os.close(number_out)
    number = int(os.read(number_in, 16))
    os.close(number_in)
    os.setsid()
    return writable, number


def open_null() -> int:
    """What leave_terminal() takes."""
    return os.open(os.devnull, os.O_RDWR)


def leave_terminal(null: int) -> None:
    """Release the working directory, stdin, stdout and stderr."""
    os.chdir("/")
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
