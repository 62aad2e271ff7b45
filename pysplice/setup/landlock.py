"""No file can be reached any more, no abstract socket and no process outside (landlock(7)).

Owns nothing.  Imports isolation.py and config.py.  The calls have no function in the C library; since Linux 5.1 a
number is the same everywhere.
"""

import ctypes
import errno
import os
import struct

from .isolation import call

CREATE_RULESET, RESTRICT_SELF = 444, 446
CREATE_RULESET_VERSION = 1

# Rights over files that each version of the interface has: LANDLOCK_ACCESS_FS_*
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
SCOPES = 3  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL, version 6

_libc = ctypes.CDLL(None, use_errno=True)


def restrict() -> None:
    """From now on; needs no_new_privs.  A kernel that does not have it is none the wiser; raises ConfigError."""
    version = _libc.syscall(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    if version < 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP):
            return
        call("ask for landlock", version)
    rights = RIGHTS[max(known for known in RIGHTS if known <= version)]
    # struct landlock_ruleset_attr: as much of it as this version knows
    attributes = struct.pack("=QQQ", rights, 0, SCOPES if version >= 6 else 0)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = call("make a landlock ruleset", _libc.syscall(CREATE_RULESET, attributes, len(attributes), 0))
    try:
        call("restrict this process by landlock", _libc.syscall(RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
