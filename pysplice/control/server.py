"""Control at run time: a UNIX socket that takes one request a line and gives one answer a line, as JSON.

Owns its clients, which the keeper has let in (sockets/unix.py).  Imports `config` and `loop`.

    {"do": "show"}
    {"do": "add", "option": "-t", "ports": "8080:80"}
    {"do": "del", "option": "-t", "ports": "8080:80"}
    [{"do": "add", ...}, {"do": "add", ...}]

A list of changes is made as a whole or not at all.  An answer has `ok`, and `error` or what was asked for; `notes` are
lines for the user.
"""

# system calls (serve): recvfrom sendto

import contextlib
import json
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from ..config import ConfigError
from ..config.ports import OPTIONS, Rule, parse
from ..loop import Loop

LINE_MAX = 65536  # bytes
CLIENTS_MAX = 16


class Forwarding(Protocol):
    """What is controlled."""

    def add(self, rule: Rule) -> str:
        """Forward more, and return what the user should know about it, or nothing; raises ConfigError."""

    def remove(self, rule: Rule) -> None:
        """Forward less; raises ConfigError."""


class Control:
    """The server; clients are brought by take().  `show` gives the answer to that request."""

    def __init__(self, forwarding: Forwarding, show: Callable[[], dict[str, Any]], loop: Loop) -> None:
        self._forwarding = forwarding
        self._show = show
        self._loop = loop
        self._clients: dict[socket.socket, bytearray] = {}  # and what each has sent of its next line

    def take(self, client: socket.socket) -> None:
        """Serve a client."""
        if len(self._clients) >= CLIENTS_MAX:
            # The client that has been connected longest gives way
            self._drop(next(iter(self._clients)))
        client.setblocking(False)
        self._clients[client] = bytearray()
        self._loop.watch(client.fileno(), partial(self._read, client))

    def _read(self, client: socket.socket) -> None:
        held = self._clients[client]
        try:
            data = client.recv(LINE_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        held += data
        if not data or len(held) > LINE_MAX:
            self._drop(client)
            return
        # A request may bring other clients (Proxy.add()), to which this one has to give way
        while b"\n" in held and client in self._clients:
            line, _, rest = bytes(held).partition(b"\n")
            held[:] = rest
            answer = json.dumps(self._answer(line)).encode() + b"\n"
            try:
                if client.send(answer) < len(answer):
                    self._drop(client)
            except OSError:
                self._drop(client)

    def _answer(self, line: bytes) -> dict[str, Any]:
        """The answer to one request."""
        try:
            request = json.loads(line)
            if isinstance(request, dict) and request["do"] == "show":
                return {"ok": True, **self._show()}
            changes = request if isinstance(request, list) else [request]
            notes = self._change([change for each in changes for change in _changes(each)])
        except ConfigError as e:
            return {"ok": False, "error": str(e)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {"ok": False, "error": "not a request"}
        except OSError as e:
            return {"ok": False, "error": e.strerror or str(e)}
        return {"ok": True, "notes": notes} if notes else {"ok": True}

    def _change(self, changes: list[tuple[bool, Rule]]) -> list[str]:
        """Make all of these changes (True: add the rule) or none; lines for the user.  Raises ConfigError."""
        done: list[tuple[bool, Rule]] = []
        notes = []
        for add, rule in changes:
            try:
                if add:
                    notes.append(self._forwarding.add(rule))
                else:
                    self._forwarding.remove(rule)
            except ConfigError:
                for added, other in reversed(done):
                    if added:
                        self._forwarding.remove(other)
                    else:
                        with contextlib.suppress(ConfigError):  # another program has the port by now
                            self._forwarding.add(other)
                raise
            done.append((add, rule))
        return list(filter(None, notes))

    def _drop(self, client: socket.socket) -> None:
        if self._clients.pop(client, None) is not None:
            self._loop.unwatch(client.fileno())
            client.close()

    def close(self) -> None:
        """Drop all clients."""
        for client in list(self._clients):
            self._drop(client)


def _changes(request: Any) -> list[tuple[bool, Rule]]:
    """The changes of a request; raises ConfigError, or what a text that is not a request raises."""
    what = request["do"]
    if what not in ("add", "del"):
        raise ConfigError(f"unknown request '{what}'")
    option, text = str(request["option"]), str(request["ports"])
    if option not in OPTIONS or text == "none":
        raise ConfigError(f"one of -t, -u, -T and -U and ports are needed, not '{option} {text}'")
    return [(what == "add", rule) for rule in parse(option, *OPTIONS[option], text)]
