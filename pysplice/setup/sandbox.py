"""A place to serve from: nothing to open, nothing to run, nobody to look into.

Owns nothing.  Imports isolation.py and config.py.

Who serves reads what a guest sends, and a guest may be hostile.  If it should ever get hold of the process, there is
to be little that it can do: the root is empty and cannot be written (mount_namespaces(7)), and system calls that
start programs, look into other processes, make namespaces or reach rarely used parts of the kernel fail
(seccomp(2)).  All that has a path must be open before.
"""

import ctypes
import errno
import os
import socket
import struct

from ..config import ConfigError
from . import isolation

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_THREAD = 0x00010000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

# Where the empty root is mounted before it becomes the root; the first that there is
PLACES = ("/tmp", "/proc", "/dev", "/var")

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000

# struct sock_filter, and where struct seccomp_data has what
INSTRUCTION = struct.Struct("=HBBI")
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE = 0, 4
ARGUMENTS = (16, 24, 32)  # their lower halves: none of those that count is longer
X32_BIT = 0x40000000

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Those whose arguments are looked at: with others they are no harm
CHECKED = ("clone", "tgkill", "prlimit64", "fcntl", "ioctl", "socket")
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15
FIOSETOWN, SIOCSPGRP, TIOCSTI = 0x8901, 0x8902, 0x5412
NETLINK_ROUTE, NETLINK_SOCK_DIAG = 0, 4

# Since Linux 5.1 new ones have the same number everywhere
_COMMON = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "process_mrelease": 448,
}
NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": _COMMON
    | {
        "ioctl": 16,
        "socket": 41,
        "clone": 56,
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "kill": 62,
        "fcntl": 72,
        "ptrace": 101,
        "syslog": 103,
        "rt_sigqueueinfo": 129,
        "personality": 135,
        "setpriority": 141,
        "sched_setparam": 142,
        "sched_setscheduler": 144,
        "modify_ldt": 154,
        "pivot_root": 155,
        "chroot": 161,
        "acct": 163,
        "mount": 165,
        "umount2": 166,
        "swapon": 167,
        "swapoff": 168,
        "reboot": 169,
        "iopl": 172,
        "ioperm": 173,
        "init_module": 175,
        "delete_module": 176,
        "quotactl": 179,
        "tkill": 200,
        "sched_setaffinity": 203,
        "tgkill": 234,
        "kexec_load": 246,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "ioprio_set": 251,
        "migrate_pages": 256,
        "unshare": 272,
        "move_pages": 279,
        "rt_tgsigqueueinfo": 297,
        "perf_event_open": 298,
        "fanotify_init": 300,
        "prlimit64": 302,
        "name_to_handle_at": 303,
        "open_by_handle_at": 304,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "kcmp": 312,
        "finit_module": 313,
        "sched_setattr": 314,
        "kexec_file_load": 320,
        "bpf": 321,
        "execveat": 322,
        "userfaultfd": 323,
    },
    "aarch64": _COMMON
    | {
        "fcntl": 25,
        "ioctl": 29,
        "ioprio_set": 30,
        "umount2": 39,
        "mount": 40,
        "pivot_root": 41,
        "chroot": 51,
        "quotactl": 60,
        "acct": 89,
        "personality": 92,
        "unshare": 97,
        "kexec_load": 104,
        "init_module": 105,
        "delete_module": 106,
        "syslog": 116,
        "ptrace": 117,
        "sched_setparam": 118,
        "sched_setscheduler": 119,
        "sched_setaffinity": 122,
        "kill": 129,
        "tkill": 130,
        "tgkill": 131,
        "rt_sigqueueinfo": 138,
        "setpriority": 140,
        "reboot": 142,
        "socket": 198,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "clone": 220,
        "execve": 221,
        "swapon": 224,
        "swapoff": 225,
        "migrate_pages": 238,
        "move_pages": 239,
        "rt_tgsigqueueinfo": 240,
        "perf_event_open": 241,
        "prlimit64": 261,
        "fanotify_init": 262,
        "name_to_handle_at": 264,
        "open_by_handle_at": 265,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "kcmp": 272,
        "finit_module": 273,
        "sched_setattr": 274,
        "bpf": 280,
        "execveat": 281,
        "userfaultfd": 282,
        "kexec_file_load": 294,
    },
}

_libc = ctypes.CDLL(None, use_errno=True)


def enter(empty: bool = True, chroot_fallback: bool = False) -> str:
    """Give up privileges, and all that was said above; what could not be done, empty if all could.

    With `empty` the root becomes an empty one; with `chroot_fallback` also where it cannot be pivoted.
    """
    complaint = ""
    if empty:
        try:
            _empty_root(chroot_fallback)
        except ConfigError as e:
            complaint = f"no root of our own: {e}"
    isolation.drop_privileges()
    try:
        _filter_calls()
    except ConfigError as e:
        complaint = f"{complaint}; {e}".lstrip("; ")
    return complaint


def _call(what: str, result: int) -> None:
    if result < 0:
        raise ConfigError(f"cannot {what}: {os.strerror(ctypes.get_errno())}")


def _empty_root(chroot_fallback: bool) -> None:
    """An empty root file system, and mount, IPC and UTS namespaces of our own.

    Without CAP_SYS_ADMIN we make a user namespace to have it in.
    """
    _libc.tzset()  # the system's logger has local time
    privileged = isolation.may_mount()
    if not privileged and isolation.may_bind_low_ports():
        # In a user namespace of our own it would be for nothing
        raise ConfigError("it would cost the capability for ports below 1024")
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | (0 if privileged else CLONE_NEWUSER)
    _call("make namespaces", _libc.unshare(flags))
    if not privileged:
        _stay_who_we_are(uid, gid)
    _call("keep mounts to ourselves", _libc.mount(b"", b"/", b"", MS_REC | MS_PRIVATE, b""))
    place = next((path for path in PLACES if os.path.isdir(path)), "/")
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    options = b"nr_inodes=2,nr_blocks=0"
    _call("mount a root", _libc.mount(b"", place.encode(), b"tmpfs", flags, options))
    os.chdir(place)
    # Onto itself: the old root lies on top then, and is taken away (pivot_root(2))
    if _libc.pivot_root(b".", b".") == 0:
        _call("leave the root", _libc.umount2(b".", MNT_DETACH | UMOUNT_NOFOLLOW))
    else:
        _call("change the root", _libc.chroot(b".") if chroot_fallback else -1)
    os.chdir("/")


def _stay_who_we_are(uid: int, gid: int) -> None:
    """In a new user namespace, the same IDs (user_namespaces(7))."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as e:
            raise ConfigError(f"cannot write {name}: {e.strerror}") from None


def program(machine: str, pid: int) -> bytes:
    """The filter for the process `pid` of a `machine`: instructions of classic BPF; empty where it is unknown."""
    numbers = NUMBERS.get(machine)
    if numbers is None:
        return b""
    denied = [number for name, number in sorted(numbers.items()) if name not in (*CHECKED, "clone3")]
    # Jumps go forward, to a label; without one to the next instruction
    lines: list[str | tuple[int, str, str, int]] = [
        (LOAD, "", "", ARCHITECTURE),
        (JUMP_EQUAL, "", "denied", AUDIT_ARCH[machine]),
        (LOAD, "", "", NUMBER),
        *([(JUMP_AT_LEAST, "denied", "", X32_BIT)] if machine == "x86_64" else []),
        # With ENOSYS the C library tries clone(), whose flags can be looked at
        (JUMP_EQUAL, "missing", "", numbers["clone3"]),
        *((JUMP_EQUAL, name, "", numbers[name]) for name in CHECKED),
        *((JUMP_EQUAL, "denied", "", number) for number in denied),
        (RETURN, "", "", SECCOMP_RET_ALLOW),
        # Threads, but no processes
        "clone",
        (LOAD, "", "", ARGUMENTS[0]),
        (JUMP_ANY, "allowed", "denied", CLONE_THREAD),
        # raise(3)
        "tgkill",
        (LOAD, "", "", ARGUMENTS[0]),
        (JUMP_EQUAL, "allowed", "denied", pid),
        "prlimit64",
        (LOAD, "", "", ARGUMENTS[0]),
        (JUMP_EQUAL, "allowed", "", 0),
        (JUMP_EQUAL, "allowed", "denied", pid),
        # Who gets the signal of a descriptor, and which one
        "fcntl",
        (LOAD, "", "", ARGUMENTS[1]),
        (JUMP_EQUAL, "denied", "", F_SETOWN),
        (JUMP_EQUAL, "denied", "", F_SETSIG),
        (JUMP_EQUAL, "denied", "allowed", F_SETOWN_EX),
        "ioctl",
        (LOAD, "", "", ARGUMENTS[1]),
        (JUMP_EQUAL, "denied", "", FIOSETOWN),
        (JUMP_EQUAL, "denied", "", SIOCSPGRP),
        (JUMP_EQUAL, "denied", "allowed", TIOCSTI),
        "socket",
        (LOAD, "", "", ARGUMENTS[0]),
        *(
            (JUMP_EQUAL, "allowed", "", family)
            for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        ),
        (JUMP_EQUAL, "", "denied", socket.AF_NETLINK),
        (LOAD, "", "", ARGUMENTS[2]),
        (JUMP_EQUAL, "allowed", "", NETLINK_ROUTE),
        (JUMP_EQUAL, "allowed", "denied", NETLINK_SOCK_DIAG),
        "allowed",
        (RETURN, "", "", SECCOMP_RET_ALLOW),
        "denied",
        (RETURN, "", "", SECCOMP_RET_ERRNO | errno.EPERM),
        "missing",
        (RETURN, "", "", SECCOMP_RET_ERRNO | errno.ENOSYS),
    ]
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


def _filter_calls() -> None:
    """Have those system calls fail from now on (EPERM); needs no_new_privs."""
    code = program(os.uname().machine, os.getpid())
    if not code:
        return
    text = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog
    fprog = struct.pack("@HP", len(code) // INSTRUCTION.size, ctypes.addressof(text))
    result = _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, fprog, 0, 0)
    _call("filter system calls", result)
