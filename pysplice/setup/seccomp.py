"""Filters of system calls: each process of ours may make the calls of its role, and no others (seccomp(2)).

Owns nothing.  Imports `config`, libc.py and syscalls.py: the calls and their numbers, which
contrib/list-syscalls collects from the lines "system calls (ROLE): ..." in the code that makes them.

The program is generated here rather than by libseccomp.  It is one list and a few arguments; and where that library is
missing, this code would be needed all the same.
"""

import ctypes
import errno
import os
import socket
import struct

from ..config import ConfigError
from . import libc
from .syscalls import NUMBERS, ROLES

SECCOMP_MODE_FILTER = 2
SECCOMP_RET_KILL_PROCESS = 0x80000000
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000

# struct sock_filter, and the offsets of the fields of struct seccomp_data
INSTRUCTION = struct.Struct("=HBBI")
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE = 0, 4
ARGUMENTS = (16, 24, 32)  # their lower halves: none of those that matter is longer
X32_BIT = 0x40000000

AUDIT_ARCH = {
    "x86_64": 0xC000003E,
    "aarch64": 0xC00000B7,
    "riscv64": 0xC00000F3,
    "loongarch64": 0xC0000102,
}
# Older interfaces that a command may use on the same kernel
AUDIT_ARCH_I386, IOCTL_I386, IOCTL_X32 = 0x40000003, 54, X32_BIT | 514

NETLINK_ROUTE, NETLINK_SOCK_DIAG = 0, 4
TIOCSTI, TIOCLINUX = 0x5412, 0x541C

# Calls whose arguments are looked at: (argument, values that pass)
F_DUPFD_CLOEXEC, F_SETPIPE_SZ = 1030, 1031
F_GETFD, F_SETFD, F_GETFL, F_SETFL = 1, 2, 3, 4
TCGETS, TIOCOUTQ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x5411, 0x541B, 0x5421, 0x5450, 0x5451
SIOCGIFNAME, SIOCGIFINDEX = 0x8910, 0x8933
CHECKED: dict[str, tuple[int, tuple[int, ...]]] = {
    "fcntl": (1, (F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETFD, F_SETFD, F_GETFL, F_SETFL)),
    "ioctl": (1, (TCGETS, TIOCOUTQ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, SIOCGIFNAME, SIOCGIFINDEX)),
    "socket": (0, (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)),
}


def _kill() -> bool:
    """True in the tests: there a call that is not on the list ends the process, so that none goes unnoticed."""
    return os.environ.get("PYSPLICE_SECCOMP") == "kill"


_Line = str | tuple[int, str, str, int]


def program(machine: str, pid: int, role: str = "serve", kill: bool = False) -> bytes:
    """The filter for the process `pid` in a role: instructions of classic BPF; empty where the machine is unknown.

    Calls that are not on the list fail with EPERM, or end the process with `kill`; clone3 fails with ENOSYS.
    """
    numbers = NUMBERS.get(machine)
    if numbers is None:
        return b""
    names = sorted(name for name in ROLES[role] if name in numbers)
    lines: list[_Line] = [
        (LOAD, "", "", ARCHITECTURE),
        (JUMP_EQUAL, "", "denied", AUDIT_ARCH[machine]),
        (LOAD, "", "", NUMBER),
        *([(JUMP_AT_LEAST, "denied", "", X32_BIT)] if machine == "x86_64" else []),
        *(
            (JUMP_EQUAL, name if name in (*CHECKED, "tgkill") else "allowed", "", numbers[name])
            for name in names
        ),
        (JUMP_EQUAL, "missing", "denied", CLONE3),
    ]
    for name, (argument, values) in CHECKED.items():
        lines += [name, (LOAD, "", "", ARGUMENTS[argument])]
        passes = "protocol" if name == "socket" else "allowed"
        for value in values:
            lines.append((JUMP_EQUAL, passes if value == socket.AF_NETLINK else "allowed", "", value))
        lines.append((RETURN, "", "", SECCOMP_RET_ERRNO | errno.EPERM))
    lines += [
        "protocol",
        (LOAD, "", "", ARGUMENTS[2]),
        (JUMP_EQUAL, "allowed", "", NETLINK_ROUTE),
        (JUMP_EQUAL, "allowed", "refused", NETLINK_SOCK_DIAG),
        # raise(3)
        "tgkill",
        (LOAD, "", "", ARGUMENTS[0]),
        (JUMP_EQUAL, "allowed", "refused", pid),
        "refused",
        (RETURN, "", "", SECCOMP_RET_ERRNO | errno.EPERM),
        "allowed",
        (RETURN, "", "", SECCOMP_RET_ALLOW),
        "denied",
        (RETURN, "", "", SECCOMP_RET_KILL_PROCESS if kill else SECCOMP_RET_ERRNO | errno.EPERM),
        "missing",
        (RETURN, "", "", SECCOMP_RET_ERRNO | errno.ENOSYS),
    ]
    return _assembled(lines)


# The same on every machine.  The C library falls back to clone() where clone3() is missing.
CLONE3, IO_URING_SETUP = 435, 425


def terminal_program(machine: str) -> bytes:
    """A filter for a command with a terminal: it cannot push input into it (TIOCSTI, TIOCLINUX)."""
    numbers = NUMBERS.get(machine)
    if numbers is None:
        return b""
    entries: list[_Line] = [(JUMP_EQUAL, "ioctl", "", numbers["ioctl"])]
    if machine == "x86_64":
        entries.append((JUMP_EQUAL, "ioctl", "", IOCTL_X32))
    return _assembled(
        [
            (LOAD, "", "", ARCHITECTURE),
            (JUMP_EQUAL, "", "other", AUDIT_ARCH[machine]),
            (LOAD, "", "", NUMBER),
            *entries,
            (RETURN, "", "", SECCOMP_RET_ALLOW),
            "other",
            (LOAD, "", "", NUMBER),
            (JUMP_EQUAL, "ioctl", "allowed", IOCTL_I386),
            "ioctl",
            (LOAD, "", "", ARGUMENTS[1]),
            (JUMP_EQUAL, "denied", "", TIOCSTI),
            (JUMP_EQUAL, "denied", "allowed", TIOCLINUX),
            "allowed",
            (RETURN, "", "", SECCOMP_RET_ALLOW),
            "denied",
            (RETURN, "", "", SECCOMP_RET_ERRNO | errno.EPERM),
        ]
    )


def _assembled(lines: list[_Line]) -> bytes:
    """Instructions, with labels turned into jumps; they go forward, and an empty label is the next instruction."""
    labels: dict[str, int] = {}
    code: list[tuple[int, str, str, int]] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(code)
        else:
            code.append(line)

    def distance(label: str, at: int) -> int:
        return labels[label] - at - 1 if label else 0

    return b"".join(
        INSTRUCTION.pack(what, distance(yes, at), distance(no, at), value)
        for at, (what, yes, no, value) in enumerate(code)
    )


def confine(role: str) -> None:
    """Allow only the calls of this role from now on; needs no_new_privs.  Raises ConfigError."""
    code = program(os.uname().machine, os.getpid(), role, _kill())
    if not code:
        raise ConfigError(f"no filter of system calls: their numbers on {os.uname().machine} are not known")
    load(code)


def without_rings() -> None:
    """Hide io_uring from now on, so that the loop does without; needs no_new_privs.  Raises ConfigError.

    libuv makes a ring with each loop.  What goes through a ring bypasses a filter of system calls.
    """
    machine = os.uname().machine
    if machine not in AUDIT_ARCH:
        return
    load(
        _assembled(
            [
                (LOAD, "", "", ARCHITECTURE),
                (JUMP_EQUAL, "", "allowed", AUDIT_ARCH[machine]),
                (LOAD, "", "", NUMBER),
                (JUMP_EQUAL, "missing", "allowed", IO_URING_SETUP),
                "allowed",
                (RETURN, "", "", SECCOMP_RET_ALLOW),
                "missing",
                (RETURN, "", "", SECCOMP_RET_ERRNO | errno.ENOSYS),
            ]
        )
    )


def protect_terminal() -> None:
    """Filter for a command that is about to be run; needs CAP_SYS_ADMIN in its user namespace.  Raises ConfigError."""
    code = terminal_program(os.uname().machine)
    if code:
        load(code)


def load(code: bytes) -> None:
    """Have the kernel run a filter for each system call from now on; raises ConfigError."""
    text = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog
    fprog = struct.pack("@HP", len(code) // INSTRUCTION.size, ctypes.addressof(text))
    libc.prctl("filter system calls", libc.PR_SET_SECCOMP, SECCOMP_MODE_FILTER, fprog)
