"""Child processes, and what they report: JSON and descriptors over a socket pair.

Owns nothing.  Imports `config`.
"""

import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..config import ConfigError

MESSAGE_MAX = 65536
LENGTH = struct.Struct("=I")

Main = Callable[..., int]


def fork(main: Main, *args: Any) -> tuple[socket.socket, int]:
    """A child that runs `main` with its end of a socket pair as the first argument; our end, and its process ID."""
    ours, theirs = pair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        run(main, theirs, *args)
    theirs.close()
    return ours, pid


def pair() -> tuple[socket.socket, socket.socket]:
    """The socket pair of a parent and its child."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def run(main: Main, control: socket.socket, *args: Any) -> NoReturn:
    """Run `main` in a child, and exit with its result; what it raises is reported to the parent."""
    status = 1
    try:
        status = main(control, *args)
    except ConfigError as e:
        report(control, {"error": str(e)})
    except BaseException as e:
        report(control, {"error": f"{type(e).__name__}: {e}"})
    finally:
        os._exit(status)


def report(control: socket.socket, words: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send what receive() takes."""
    text = json.dumps(words).encode()
    socket.send_fds(control, [LENGTH.pack(len(text))], fds)
    for at in range(0, len(text), MESSAGE_MAX):
        control.send(text[at : at + MESSAGE_MAX])


def receive(control: socket.socket) -> tuple[list[int], dict[str, Any]]:
    """What a child reports, with the descriptors; raises ConfigError with its message if it has failed."""
    # In two messages: the text may be long, and descriptors need a byte to travel with
    length, fds, _, _ = socket.recv_fds(control, LENGTH.size, 1)
    if len(length) < LENGTH.size:
        raise ConfigError("the process in the namespace ended before everything was ready")
    left, parts = LENGTH.unpack(length)[0], []
    while left:
        part = control.recv(MESSAGE_MAX)
        if not part:
            raise ConfigError("the process in the namespace ended before everything was ready")
        parts.append(part)
        left -= len(part)
    words = json.loads(b"".join(parts))
    if "error" in words:
        raise ConfigError(words["error"])
    return fds, words
