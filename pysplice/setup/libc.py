"""Calls of the C library and the kernel that Python does not have, and their constants.

Owns nothing.  Imports `config`.  Each function raises ConfigError ("cannot WHAT: reason") unless it says otherwise.
"""

import ctypes
import errno
import os

from ..config import ConfigError

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38

# capabilities(7)
CAPABILITY_VERSION_3 = 0x20080522
CAP_LAST = 63
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21

# clone(2), unshare(2), setns(2)
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220}

# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 0x1000, 0x4000, 0x40000, 0x80000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

# inotify(7)
IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x4, 0x8, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_DELETE_SELF = 0x100, 0x200, 0x400
IN_CLOEXEC, IN_NONBLOCK = 0o2000000, 0o4000

# signalfd(2)
SFD_CLOEXEC, SFD_NONBLOCK = 0o2000000, 0o4000

# PyDLL keeps the interpreter's lock: a child made by clone() must not wait for a lock that its parent holds
_libc = ctypes.PyDLL(None, use_errno=True)


def call(what: str, result: int) -> int:
    """The result of a C function, if it is not below 0."""
    if result < 0:
        number = ctypes.get_errno()
        raise ConfigError(f"cannot {what}: {os.strerror(number)}")
    return result


def prctl(what: str, option: int, value: object, other: object = 0) -> int:
    """prctl(2)."""
    return call(what, _libc.prctl(option, value, other, 0, 0))


def has_capability_bound(capability: int) -> bool:
    """True if a capability is in the bounding set; False too if the kernel does not know it."""
    return bool(_libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) > 0)


def capget(header: object, data: object) -> bool:
    """capget(2); False if it fails."""
    return bool(_libc.capget(header, data) == 0)


def capset(what: str, header: object, data: object) -> None:
    """capset(2)."""
    call(what, _libc.capset(header, data))


def unshare(what: str, flags: int) -> None:
    """unshare(2)."""
    call(what, _libc.unshare(flags))


def setns(what: str, fd: int, kind: int, hint: str = "") -> None:
    """setns(2).  `hint`: what helps where it is not permitted."""
    if _libc.setns(fd, kind) < 0:
        number = ctypes.get_errno()
        reason = "not a namespace of that kind" if number == errno.EINVAL else os.strerror(number)
        raise ConfigError(f"cannot {what}: {reason}{hint if number == errno.EPERM else ''}")


def clone(flags: int) -> int:
    """clone(2) without a stack: 0 in the child, its process ID in the parent; raises OSError."""
    number = SYS_CLONE.get(os.uname().machine, 120)
    pid = int(_libc.syscall(number, flags, 0, 0, 0, 0))
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return pid


def mount(what: str, source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, flags, options.encode() or None
    )
    call(what, result)


def umount(what: str, target: str, flags: int) -> None:
    """umount2(2)."""
    call(what, _libc.umount2(target.encode(), flags))


def pivot_root(new: str, old: str) -> bool:
    """pivot_root(2); False if it fails."""
    return bool(_libc.pivot_root(new.encode(), old.encode()) == 0)


def chroot(what: str, path: str) -> None:
    """chroot(2)."""
    call(what, _libc.chroot(path.encode()))


def tzset() -> None:
    """Read the local time zone now: later there may be no file to read it from."""
    _libc.tzset()


def inotify() -> int:
    """A descriptor that reports what happens in directories (inotify(7)); -1 if none is available."""
    return int(_libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK))


def inotify_add(fd: int, path: str, mask: int) -> bool:
    """Have it report events of `mask` in a directory, or of a file; False if that is not possible."""
    return int(_libc.inotify_add_watch(fd, os.fsencode(path), mask)) >= 0


def signalfd(mask: bytes) -> int:
    """A descriptor that is readable when a signal of the mask has come (signalfd(2))."""
    return call("watch signals", _libc.signalfd(-1, mask, SFD_CLOEXEC | SFD_NONBLOCK))


def syscall(number: int, *arguments: object) -> int:
    """A system call that has no function; its result, or -errno."""
    result = int(_libc.syscall(number, *arguments))
    return result if result >= 0 else -ctypes.get_errno()
