"""Giving up what is not needed, and going to the background.

Owns nothing.  Imports config.py.
"""

import ctypes
import errno
import os
import resource
import stat
import struct
from typing import TextIO

from ..config import ConfigError

PR_SET_NO_NEW_PRIVS = 38
PR_CAPBSET_DROP = 24
CAP_LAST = 63
CAPABILITY_VERSION_3 = 0x20080522
CAP_NET_BIND_SERVICE = 10
CAP_SETUID = 7
CAP_SETPCAP = 8
PR_CAPBSET_READ = 23
CAP_SYS_ADMIN = 21
PR_SET_KEEPCAPS = 8
PR_SET_DUMPABLE = 4
FD_MAX = 2**31 - 1
FILES_NEEDED = 40

_libc = ctypes.CDLL(None, use_errno=True)


def close_leaked(keep: int | None) -> None:
    """Close what the caller left open above stderr, and fill what it closed below."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    close_but(*(() if keep is None else (keep,)))


def close_but(*keep: int) -> None:
    """Close everything above stderr but these descriptors."""
    first = 3
    for fd in sorted({fd for fd in keep if fd > 2}):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, FD_MAX)


def check_file_limit() -> None:
    """Raises ConfigError where so few descriptors are to be had that nothing works."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES_NEEDED:
        raise ConfigError(f"{hard} descriptors are too few, {FILES_NEEDED} are needed (ulimit -n)")


def raise_file_limit() -> int:
    """As many descriptors as we may have; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def call(what: str, result: int) -> int:
    """The result of a C function; raises ConfigError ("cannot WHAT: why") if it is below 0."""
    if result < 0:
        raise ConfigError(f"cannot {what}: {os.strerror(ctypes.get_errno())}")
    return result


def drop_privileges() -> None:
    """No capability, and no way to one, but that for the ports below 1024: they may have to be bound later.

    Raises ConfigError.
    """
    keep = _permitted() & 1 << CAP_NET_BIND_SERVICE
    renounce_new_privileges()
    if _permitted() >> CAP_SETPCAP & 1:
        for capability in range(CAP_LAST + 1):
            held = _libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0)
            if held > 0 and not keep >> capability & 1:
                call("give up capabilities", _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
    _set_capabilities(keep)


def renounce_new_privileges() -> None:
    """No program that is run from now on gives more of them; raises ConfigError."""
    call("renounce new privileges", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _set_capabilities(kept: int) -> None:
    """Permitted and effective ones, the lower 32; no others."""
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("IIIIII", kept, kept, 0, 0, 0, 0))
    call("set capabilities", _libc.capset(header, data))


def user_to_become(runas: str) -> tuple[int, int] | None:
    """User and group for UID[:GID] or LOGIN[:GROUP]; None: stay who we are.  Raises ConfigError.

    Without a wish, root of the initial user namespace becomes nobody, as pasta does.
    """
    import grp
    import pwd

    if not runas:
        if not is_root():
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


def is_root() -> bool:
    """True for root of the initial user namespace: the host's."""
    if os.geteuid() != 0:
        return False
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return False


def become(user: tuple[int, int] | None) -> None:
    """Change to this user and group, and keep the capabilities; raises ConfigError."""
    if user is None or user == (os.geteuid(), os.getegid()):
        return
    call("keep capabilities", _libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
    permitted = _permitted()
    try:
        os.setgroups([])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
    except OSError as e:
        raise ConfigError(f"cannot become user {user[0]}, group {user[1]}: {e.strerror}") from None
    # The effective ones are gone, and processes of the new user could look into this one
    _set_capabilities(permitted)
    hide()


def may_bind_low_ports() -> bool:
    """True if we have the privilege to bind ports below 1024."""
    return bool(_permitted() >> CAP_NET_BIND_SERVICE & 1)


def may_mount() -> bool:
    """True if we have the privilege to make namespaces and mount in them."""
    return bool(_permitted() >> CAP_SYS_ADMIN & 1)


def hide(hidden: bool = True) -> None:
    """No other process may look into this one, not even root's of the namespace that it works in."""
    call("hide this process", _libc.prctl(PR_SET_DUMPABLE, int(not hidden), 0, 0, 0))


def _permitted() -> int:
    """The capabilities that we may have, the lower 32."""
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data):
        return 0
    return int(struct.unpack_from("3I", data)[1])


LINKS_MAX = 8


def _open(path: str, flags: int, mode: int) -> int:
    """Open a file for writing, empty; raises ConfigError.

    A link to it is followed if it is ours or root's: in a directory that others write to, another user's may lead
    to a file that is not that user's to write (as fs.protected_symlinks has it, where that is on).  It never blocks:
    not now for the reader of a FIFO, and not later.
    """
    flags |= os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
    at = path
    try:
        for _ in range(LINKS_MAX):
            try:
                return os.open(at, flags, mode)
            except OSError as e:
                if e.errno != errno.ELOOP:
                    raise
            link = os.open(at, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(link)
                if not stat.S_ISLNK(found.st_mode):
                    continue  # it has just been replaced
                if found.st_uid not in (0, os.geteuid()):
                    raise ConfigError(f"cannot write {path}: it is a link of another user's")
                at = os.path.join(os.path.dirname(at), os.readlink("", dir_fd=link))
            finally:
                os.close(link)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from None


def open_pid_file(path: str) -> int:
    """Open the file for our process ID before anything is given up; raises ConfigError."""
    return _open(path, os.O_WRONLY, 0o600)


def open_trace(path: str) -> TextIO:
    """Open the file for the trace of windows; raises ConfigError."""
    return os.fdopen(_open(path, os.O_WRONLY, 0o600), "w", encoding="ascii")


def open_output(path: str) -> int:
    """Open a file for a log or a capture, for us alone; raises ConfigError."""
    return _open(path, os.O_RDWR, 0o600)


def write_pid_file(fd: int, pid: int) -> None:
    try:
        os.write(fd, f"{pid}\n".encode())
        os.close(fd)
    except OSError as e:
        raise ConfigError(f"cannot write the process ID: {e.strerror}") from None


def to_background() -> tuple[int, int]:
    """Fork: returns in the child, with the descriptor by which it says that all is well, and its process ID.

    The process ID is that in the namespace of the parent.  The parent ends with status 0 when the child has written
    to the descriptor, 1 if it dies before.
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
    """Release the directory, stdin, stdout and stderr."""
    os.chdir("/")
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
