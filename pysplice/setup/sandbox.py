"""The place to serve from: no file to open, no program to run, no process to look into.

Owns nothing.  Imports `config` and the files of this room.

The process that serves reads what a guest sends, and a guest may be hostile.  A guest that takes over the process can
do little from there: the root is empty and cannot be written (mount_namespaces(7)), no file, no other process and no
abstract socket can be reached (landlock(7), where the kernel has it), and only the system calls of the process's role
can be made (seccomp(2)).  Everything that has a path must be opened first.
"""

# system calls (all): read write close mmap munmap mremap mprotect brk madvise futex exit exit_group getpid gettid
# system calls (all): rt_sigaction rt_sigprocmask rt_sigreturn restart_syscall clock_gettime getrandom newfstatat fstat
# system calls (serve): chdir dup2 dup3 wait4 waitid

import os

from ..config import ConfigError
from . import landlock, libc, privileges, seccomp
from .command import map_ids

# Where the empty root is mounted before it becomes the root; the first that exists
PLACES = ("/tmp", "/proc", "/dev", "/var")

# Roles, as the lines "system calls (ROLE)" have them
SERVE, AGENT, KEEPER, FOLLOWER, CONFIGURATOR = "serve", "agent", "keeper", "follower", "configurator"


def enter(role: str = SERVE, empty: bool = True, chroot_fallback: bool = False) -> list[str]:
    """Enter the sandbox for good; returns what could not be done, one line each.

    `empty`: the root becomes an empty one; `chroot_fallback`: also where it cannot be pivoted.  Raises ConfigError if
    privileges cannot be given up.
    """
    complaints = []
    libc.tzset()  # the system's logger writes local time
    if empty:
        try:
            _empty_root(chroot_fallback)
        except ConfigError as e:
            complaints.append(f"no separate root directory: {e}")
    # A port below 1024 may have to be bound later
    privileges.drop_privileges(libc.CAP_NET_BIND_SERVICE)
    privileges.hide()
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
    """Have the next child be the first process of a new PID namespace, as pasta's in the background is.

    The result: why it could not be done, empty if it was.
    """
    try:
        _make_namespaces(libc.CLONE_NEWPID)
    except ConfigError as e:
        return f"no separate PID namespace: {e}"
    return ""


def _make_namespaces(flags: int) -> None:
    """Make these namespaces, and without CAP_SYS_ADMIN a user namespace that owns them; raises ConfigError."""
    privileged = privileges.may_mount()
    if not privileged and privileges.may_bind_low_ports():
        # In another user namespace this capability would be worth nothing
        raise ConfigError("it would cost the capability for ports below 1024")
    uid, gid = os.geteuid(), os.getegid()
    libc.unshare("make namespaces", flags | (0 if privileged else libc.CLONE_NEWUSER))
    if not privileged:
        # The same IDs as before.  The files of the maps belong to root while a process is hidden.
        privileges.hide(False)
        try:
            map_ids(f"{uid} {uid} 1", f"{gid} {gid} 1")
        finally:
            privileges.hide()


def _empty_root(chroot_fallback: bool) -> None:
    """Change to an empty root file system, in mount, IPC and UTS namespaces of our own; raises ConfigError."""
    _make_namespaces(libc.CLONE_NEWNS | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS)
    libc.mount("keep mounts apart", "", "/", "", libc.MS_REC | libc.MS_PRIVATE)
    place = next((path for path in PLACES if os.path.isdir(path)), "/")
    flags = libc.MS_RDONLY | libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    libc.mount("mount a root", "none", place, "tmpfs", flags, "nr_inodes=2,nr_blocks=0")
    os.chdir(place)
    # Onto itself: then the old root lies on top, and is unmounted (pivot_root(2))
    if libc.pivot_root(".", "."):
        libc.umount("leave the root", ".", libc.MNT_DETACH | libc.UMOUNT_NOFOLLOW)
    elif chroot_fallback:
        libc.chroot("change the root", ".")
    else:
        raise ConfigError("cannot change the root")
    os.chdir("/")
