"""Control at run time: a UNIX socket that takes one request a line and gives one answer a line, as JSON.

Owns its clients, which another process has let in (unix.py).  Imports `ports` and `config`; what it shows and
changes is given to it.

    {"do": "show"}
    {"do": "add", "option": "-t", "ports": "8080:80"}
    {"do": "del", "option": "-t", "ports": "8080:80"}

An answer has `ok`, and `error` or what was asked for.  `client` is the command line's end of it (pysplice ctl).
"""

# system calls (serve): recvfrom sendto

import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .config import ConfigError
from .ports import OPTIONS, UNIX, Rule, parse

LINE_MAX = 65536
CLIENTS_MAX = 16
TIMEOUT = 10.0

USAGE = """\
Usage: pysplice ctl PATH show
       pysplice ctl PATH add -t|-u|-T|-U PORTS
       pysplice ctl PATH del -t|-u|-T|-U PORTS

Look at or change what a running pysplice (started with -c PATH) forwards.  PORTS is written as for the
option; `show` lists rules, listeners and connections.
"""


class Forwarding(Protocol):
    """What is controlled."""

    def add(self, rule: Rule) -> None: ...
    def remove(self, rule: Rule) -> None: ...


class Control:
    """The server.  `watch(fd, call)` and `unwatch(fd)` are the loop's.

    `show` gives what is to be shown.  Clients are brought by `take`.
    """

    def __init__(
        self,
        forwarding: Forwarding,
        show: Callable[[], dict[str, Any]],
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], object],
    ) -> None:
        self._forwarding = forwarding
        self._show = show
        self._watch = watch
        self._unwatch = unwatch
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}

    def take(self, client: socket.socket) -> None:
        """A client that may ask."""
        if len(self._clients) >= CLIENTS_MAX:
            # Whoever has been there longest has had its time
            self._drop(next(iter(self._clients)))
        client.setblocking(False)
        fd = client.fileno()
        self._clients[fd] = (client, bytearray())
        self._watch(fd, lambda: self._read(fd))

    def _read(self, fd: int) -> None:
        client, held = self._clients[fd]
        try:
            data = client.recv(LINE_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        held += data
        if not data or len(held) > LINE_MAX:
            self._drop(fd)
            return
        while b"\n" in held:
            line, _, rest = bytes(held).partition(b"\n")
            held[:] = rest
            answer = json.dumps(self._do(line)).encode() + b"\n"
            try:
                if client.send(answer) < len(answer):
                    self._drop(fd)
                    return
            except OSError:
                self._drop(fd)
                return

    def _do(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            what = request["do"]
            if what == "show":
                return {"ok": True, **self._show()}
            if what not in ("add", "del"):
                raise ConfigError(f"unknown request '{what}'")
            option, text = str(request["option"]), str(request["ports"])
            if option not in OPTIONS or text == "none":
                raise ConfigError(f"one of -t, -u, -T and -U and ports are needed, not '{option} {text}'")
            rules = parse(option, *OPTIONS[option], text)
            done: list[Rule] = []
            for rule in rules:
                try:
                    (self._forwarding.add if what == "add" else self._forwarding.remove)(rule)
                except ConfigError:
                    for other in done:
                        (self._forwarding.remove if what == "add" else self._forwarding.add)(other)
                    raise
                done.append(rule)
        except ConfigError as e:
            return {"ok": False, "error": str(e)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {"ok": False, "error": "not a request"}
        except OSError as e:
            return {"ok": False, "error": e.strerror or str(e)}
        return {"ok": True}

    def _drop(self, fd: int) -> None:
        client, _ = self._clients.pop(fd)
        self._unwatch(fd)
        client.close()

    def close(self) -> None:
        for fd in list(self._clients):
            self._drop(fd)


def client(words: Sequence[str]) -> int:
    """`pysplice ctl PATH ...`: asks, prints what comes back, and gives the exit status."""
    words = list(words)
    if words in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return 0
    request: dict[str, str] | None = None
    if len(words) == 2 and words[1] == "show":
        request = {"do": "show"}
    elif len(words) == 4 and words[1] in ("add", "del"):
        request = {"do": words[1], "option": words[2], "ports": _absolute(words[3])}
    if request is None:
        said = " ".join(words[1:]) or "nothing"
        sys.stderr.write(
            f"pysplice: ctl takes PATH and show, add or del, not '{said}'; see pysplice ctl --help\n"
        )
        return 1
    try:
        answer = _ask(words[0], request)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or os.strerror(errno.EIO)
        sys.stderr.write(f"pysplice: cannot ask {words[0]}: {reason}\n")
        return 1
    if not answer.get("ok"):
        sys.stderr.write(f"pysplice: {answer.get('error')}\n")
        return 1
    for name in ("rules", "listening", "connections"):
        for line in answer.get(name, ()):
            sys.stdout.write(f"{name[:-1] if name != 'listening' else name} {line}\n")
    if "counts" in answer:
        sys.stdout.write(f"{answer['counts']}\n")
    return 0


def _absolute(ports: str) -> str:
    """A UNIX socket is where the user is, not where the process that serves is."""
    if not ports.startswith(UNIX):
        return ports
    path, colon, port = ports[len(UNIX) :].rpartition(":")
    return f"{UNIX}{os.path.abspath(path)}{colon}{port}" if path else ports


def _ask(path: str, request: dict[str, str]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile() as lines:
            answer = json.loads(lines.readline() or '{"error": "no answer"}')
    if not isinstance(answer, dict):
        raise ValueError("not an answer")
    return answer
