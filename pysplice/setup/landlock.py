"""Puts all files, abstract sockets and outside processes out of reach (landlock(7)).

Owns nothing.  Imports `config` and libc.py.  The calls have no function in the C library; since Linux 5.1 a
system call has the same number on every machine.
"""

import errno
import os
import struct

from ..config import ConfigError
from . import libc

CREATE_RULESET, RESTRICT_SELF = 444, 446
CREATE_RULESET_VERSION = 1

# Rights over files that each version of the interface has: LANDLOCK_ACCESS_FS_*
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
SCOPES = 3  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL, version 6


def restrict() -> None:
    """Restrict this process from now on; needs no_new_privs.  Raises ConfigError.

    A kernel without landlock is accepted silently.
    """
    version = libc.syscall(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    if version in (-errno.ENOSYS, -errno.EOPNOTSUPP):
        return
    _check("ask for landlock", version)
    rights = RIGHTS[max(known for known in RIGHTS if known <= version)]
    # struct landlock_ruleset_attr: as much of it as this version knows
    attributes = struct.pack("=QQQ", rights, 0, SCOPES if version >= 6 else 0)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    _check("make a landlock ruleset", ruleset)
    try:
        _check("restrict this process by landlock", libc.syscall(RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _check(what: str, result: int) -> None:
    if result < 0:
        raise ConfigError(f"cannot {what}: {os.strerror(-result)}")
