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
CAP_NET_BIND_SERVICE = 10
CAP_SETUID = 7
CAP_SYS_ADMIN = 21
PR_SET_KEEPCAPS = 8
PR_SET_DUMPABLE = 4
FD_MAX = 2**31 - 1

_libc = ctypes.CDLL(None, use_errno=True)


def close_leaked(keep: int | None) -> None:
    """Close what the caller left open above stderr, and fill what it closed below."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if keep is None:
        os.closerange(3, FD_MAX)
    else:
        close_but(keep)


def close_but(keep: int) -> None:
    """Close everything above stderr but one descriptor."""
    os.closerange(3, keep)
    os.closerange(keep + 1, FD_MAX)


def raise_file_limit() -> int:
    """As many descriptors as we may have; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def drop_privileges() -> None:
    """No capability, and no way to one, but that for the ports below 1024: they may have to be bound later."""
    keep = _permitted() & 1 << CAP_NET_BIND_SERVICE
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(CAP_LAST + 1):
        if not keep >> capability & 1:
            _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _set_capabilities(keep)


def _set_capabilities(kept: int) -> None:
    """Permitted and effective ones, the lower 32; no others."""
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("IIIIII", kept, kept, 0, 0, 0, 0))
    _libc.capset(header, data)


def user_to_become(runas: str) -> tuple[int, int] | None:
    """User and group for UID[:GID] or LOGIN[:GROUP]; None: stay who we are.  Raises ConfigError.

    Without a wish, root of the initial user namespace becomes nobody, as pasta does.
    """
    import grp
    import pwd

    if not runas:
        if os.geteuid() != 0 or not _initial_namespace():
            return None
        runas = "nobody"
    user, _, group = runas.partition(":")
    try:
        if user.isdigit():
            uid = int(user)
            gid = uid if not group else -1
        else:
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
        if group:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"no such user or group: '{runas}'") from None
    if not 0 <= uid < 2**32 - 1 or not 0 <= gid < 2**32 - 1:
        raise ConfigError(f"no such user or group: '{runas}'")
    if (uid, gid) != (os.geteuid(), os.getegid()) and not _permitted() >> CAP_SETUID & 1:
        raise ConfigError(f"cannot become user {uid}, group {gid}: it takes CAP_SETUID")
    return uid, gid


def _initial_namespace() -> bool:
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return False


def become(user: tuple[int, int] | None) -> None:
    """Change to this user and group, and keep the capabilities; raises ConfigError."""
    if user is None or user == (os.geteuid(), os.getegid()):
        return
    _libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setgroups([])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
    except OSError as e:
        raise ConfigError(f"cannot become user {user[0]}, group {user[1]}: {e.strerror}") from None
    _set_capabilities(_permitted())


def may_bind_low_ports() -> bool:
    """True if we have the privilege to bind ports below 1024."""
    return bool(_permitted() >> CAP_NET_BIND_SERVICE & 1)


def may_mount() -> bool:
    """True if we have the privilege to make namespaces and mount in them."""
    return bool(_permitted() >> CAP_SYS_ADMIN & 1)


def hide() -> None:
    """Nobody may look into this process, not even root of the namespace that it works in."""
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _permitted() -> int:
    """The capabilities that we may have, the lower 32."""
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data):
        return 0
    return int(struct.unpack_from("3I", data)[1])


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


def open_output(path: str) -> int:
    """Open a file for a log or a capture, for us alone; raises ConfigError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from None


def write_pid_file(fd: int, pid: int) -> None:
    try:
        os.write(fd, f"{pid}\n".encode())
        os.close(fd)
    except OSError as e:
        raise ConfigError(f"cannot write the process ID: {e.strerror}") from None


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


def open_null() -> int:
    """What leave_terminal() takes."""
    return os.open(os.devnull, os.O_RDWR)


def leave_terminal(null: int) -> None:
    """Release the directory, stdin, stdout and stderr."""
    os.chdir("/")
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
