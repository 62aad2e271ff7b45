"""SIGINT while a command runs: from the terminal it is the command's, from anywhere else it is ours.

Owns the descriptor that it makes.  Imports no other room.
"""

# system calls (serve): read tgkill

import ctypes
import os
import signal
import struct

SFD_CLOEXEC, SFD_NONBLOCK = 0o2000000, 0o4000
SIGSET_BYTES = 128
SIGINFO_BYTES = 128  # struct signalfd_siginfo
CODE_OFFSET = 8
SI_KERNEL = 0x80

_libc = ctypes.CDLL(None, use_errno=True)


def interrupt_fd() -> int:
    """Hold SIGINT back from now on; the descriptor is readable when there was one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    mask = (1 << (signal.SIGINT - 1)).to_bytes(SIGSET_BYTES, "little")
    return int(_libc.signalfd(-1, mask, SFD_CLOEXEC | SFD_NONBLOCK))


def on_interrupt(fd: int) -> None:
    """Ignore what the terminal's driver sent to the whole foreground group, and die of anything else."""
    (code,) = struct.unpack_from("i", os.read(fd, SIGINFO_BYTES), CODE_OFFSET)
    if code != SI_KERNEL:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.raise_signal(signal.SIGINT)
