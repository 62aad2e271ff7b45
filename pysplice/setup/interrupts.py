"""SIGINT while a command runs: from the terminal it is for the command, from another process for this one.

Owns the descriptor that it makes.  Imports libc.py.
"""

# system calls (serve): read tgkill

import os
import signal
import struct

from . import libc

SIGSET_BYTES = 128
SIGINFO_BYTES = 128  # struct signalfd_siginfo
CODE_OFFSET = 8
SI_KERNEL = 0x80


def interrupt_fd() -> int:
    """Block SIGINT from now on; the result is a descriptor that is readable when the signal has come."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    mask = (1 << (signal.SIGINT - 1)).to_bytes(SIGSET_BYTES, "little")
    return libc.signalfd(mask)


def on_interrupt(fd: int) -> None:
    """Ignore a SIGINT that the terminal has sent to its whole foreground group; die of any other."""
    (code,) = struct.unpack_from("i", os.read(fd, SIGINFO_BYTES), CODE_OFFSET)
    if code != SI_KERNEL:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.raise_signal(signal.SIGINT)
