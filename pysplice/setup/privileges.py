"""Users and capabilities: what the process becomes, and what it gives up.

Owns nothing.  Imports `config` and libc.py.
"""

import ctypes
import os
import struct

from ..config import ConfigError
from . import libc
from .libc import CAP_LAST, CAP_NET_BIND_SERVICE, CAP_SETPCAP, CAP_SETUID, CAP_SYS_ADMIN


def drop_privileges(*kept: int) -> None:
    """Give up all capabilities but these, and every way to get new ones; raises ConfigError."""
    keep = _permitted() & sum(1 << capability for capability in kept)
    renounce_new_privileges()
    if _permitted() >> CAP_SETPCAP & 1:
        for capability in range(CAP_LAST + 1):
            if libc.has_capability_bound(capability) and not keep >> capability & 1:
                libc.prctl("give up capabilities", libc.PR_CAPBSET_DROP, capability)
    _set_capabilities(keep)


def renounce_new_privileges() -> None:
    """Let no program that is run from now on give more privileges; raises ConfigError."""
    libc.prctl("renounce new privileges", libc.PR_SET_NO_NEW_PRIVS, 1)


def _set_capabilities(kept: int) -> None:
    """Have these permitted and effective capabilities (of the lower 32), and no others."""
    header = ctypes.create_string_buffer(struct.pack("Ii", libc.CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("IIIIII", kept, kept, 0, 0, 0, 0))
    libc.capset("set capabilities", header, data)


def _permitted() -> int:
    """The permitted capabilities, the lower 32 as bits."""
    header = ctypes.create_string_buffer(struct.pack("Ii", libc.CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    if not libc.capget(header, data):
        return 0
    return int(struct.unpack_from("3I", data)[1])


def user_to_become(runas: str) -> tuple[int, int] | None:
    """The user and group of --runas (UID[:GID] or LOGIN[:GROUP]); None: stay the same.  Raises ConfigError.

    Without --runas, root of the initial user namespace becomes nobody, as with pasta.
    """
    import grp
    import pwd

    if not runas:
        if not is_root():
            return None
        runas = "nobody"
    user, _, group = runas.partition(":")
    try:
        if _is_number(user):
            uid = int(user)
            gid = uid if not group else -1
        else:
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
        if group:
            gid = int(group) if _is_number(group) else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"no such user or group: '{runas}'") from None
    if not 0 <= uid < 2**32 - 1 or not 0 <= gid < 2**32 - 1:
        raise ConfigError(f"no such user or group: '{runas}'")
    if (uid, gid) != (os.geteuid(), os.getegid()) and not _permitted() >> CAP_SETUID & 1:
        raise ConfigError(f"cannot become user {uid}, group {gid}: it takes CAP_SETUID")
    return uid, gid


def is_root() -> bool:
    """True for root of the initial user namespace, the host's."""
    if os.geteuid() != 0:
        return False
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return False


def _is_number(text: str) -> bool:
    """True for the number of a user or group; others are names."""
    return text.isascii() and text.isdigit() and len(text) <= 10


def become(user: tuple[int, int] | None) -> None:
    """Change to this user and group, and keep the capabilities; raises ConfigError."""
    if user is None or user == (os.geteuid(), os.getegid()):
        return
    libc.prctl("keep capabilities", libc.PR_SET_KEEPCAPS, 1)
    permitted = _permitted()
    try:
        os.setgroups([])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
    except OSError as e:
        raise ConfigError(f"cannot become user {user[0]}, group {user[1]}: {e.strerror}") from None
    # The change has cleared the effective capabilities, and has made this process visible to others of the new user
    _set_capabilities(permitted)
    hide()


def may_bind_low_ports() -> bool:
    """True if this process has the privilege to bind ports below 1024."""
    return bool(_permitted() >> CAP_NET_BIND_SERVICE & 1)


def may_mount() -> bool:
    """True if this process has the privilege to make namespaces and to mount in them."""
    return bool(_permitted() >> CAP_SYS_ADMIN & 1)


def hide(hidden: bool = True) -> None:
    """Let no other process look into this one, not even root of the namespace that it works in."""
    libc.prctl("hide this process", libc.PR_SET_DUMPABLE, int(not hidden))
