"""A place to serve from: nothing to open, nothing to run, nobody to look into.

Owns nothing.  Imports isolation.py, seccomp.py, landlock.py and config.py.

A process of ours reads what a guest sends, and a guest may be hostile.  If it should ever get hold of the process,
there is to be little that it can do: the root is empty and cannot be written (mount_namespaces(7)), no file, no other
process and no abstract socket can be reached (landlock(7), where the kernel has it), and only the system calls of
the process's role can be made (seccomp(2)).  All that has a path must be open before.
"""

# system calls (all): read write close mmap munmap mremap mprotect brk madvise futex exit exit_group getpid gettid
# system calls (all): rt_sigaction rt_sigprocmask rt_sigreturn restart_syscall clock_gettime getrandom newfstatat fstat
# system calls (serve): chdir dup2 dup3 wait4 waitid

import ctypes
import os

from ..config import ConfigError
from . import isolation, landlock, seccomp
from .isolation import call
from .seccomp import CHECKED, INSTRUCTION, program
from .syscalls import NUMBERS

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

# Where the empty root is mounted before it becomes the root; the first that there is
PLACES = ("/tmp", "/proc", "/dev", "/var")

# Roles, as the lines "system calls (ROLE)" have them
SERVE, INSIDE, KEEPER = "serve", "inside", "keeper"

__all__ = ["CHECKED", "INSTRUCTION", "NUMBERS", "enter", "leave_pid_namespace", "program"]

_libc = ctypes.CDLL(None, use_errno=True)


def enter(role: str = SERVE, empty: bool = True, chroot_fallback: bool = False) -> list[str]:
    """Give up privileges, and all that was said above; what could not be done, one line each.

    With `empty` the root becomes an empty one; with `chroot_fallback` also where it cannot be pivoted.  Raises
    ConfigError where privileges cannot be given up.
    """
    complaints = []
    _libc.tzset()  # the system's logger has local time
    if empty:
        try:
            _empty_root(chroot_fallback)
        except ConfigError as e:
            complaints.append(f"no root of our own: {e}")
    isolation.drop_privileges()
    isolation.hide()
    if empty:
        try:
            landlock.restrict()
        except ConfigError as e:
            complaints.append(str(e))
    try:
        seccomp.confine(role)
    except ConfigError as e:
        complaints.append(str(e))
    return complaints


def leave_pid_namespace() -> str:
    """The next child that is forked is the first process of a PID namespace, as pasta's in the background is.

    Why it could not be done, empty if it could.
    """
    try:
        _make_namespaces(CLONE_NEWPID)
    except ConfigError as e:
        return f"no PID namespace of our own: {e}"
    return ""


def _make_namespaces(flags: int) -> None:
    """Without CAP_SYS_ADMIN, we make a user namespace to have it in; raises ConfigError."""
    privileged = isolation.may_mount()
    if not privileged and isolation.may_bind_low_ports():
        # In a user namespace of our own it would be for nothing
        raise ConfigError("it would cost the capability for ports below 1024")
    uid, gid = os.geteuid(), os.getegid()
    call("make namespaces", _libc.unshare(flags | (0 if privileged else CLONE_NEWUSER)))
    if not privileged:
        _stay_who_we_are(uid, gid)


def _empty_root(chroot_fallback: bool) -> None:
    """An empty root file system, and mount, IPC and UTS namespaces of our own."""
    _make_namespaces(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
    call("keep mounts to ourselves", _libc.mount(b"", b"/", b"", MS_REC | MS_PRIVATE, b""))
    place = next((path for path in PLACES if os.path.isdir(path)), "/")
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    options = b"nr_inodes=2,nr_blocks=0"
    call("mount a root", _libc.mount(b"", place.encode(), b"tmpfs", flags, options))
    os.chdir(place)
    # Onto itself: the old root lies on top then, and is taken away (pivot_root(2))
    if _libc.pivot_root(b".", b".") == 0:
        call("leave the root", _libc.umount2(b".", MNT_DETACH | UMOUNT_NOFOLLOW))
    else:
        call("change the root", _libc.chroot(b".") if chroot_fallback else -1)
    os.chdir("/")


def _stay_who_we_are(uid: int, gid: int) -> None:
    """In a new user namespace, the same IDs (user_namespaces(7))."""
    # Of a process that is hidden, these files belong to root
    isolation.hide(False)
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as e:
        raise ConfigError(f"cannot write {name}: {e.strerror}") from None
    finally:
        isolation.hide()
