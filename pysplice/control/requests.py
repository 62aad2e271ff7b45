"""Requests of `pysplice ctl`: one a line, and one answer a line, as JSON.

Owns what a client has sent of its next line.  Imports `config`.

    {"do": "show"}
    {"do": "add", "option": "-t", "ports": "8080:80"}
    {"do": "del", "option": "-t", "ports": "8080:80"}
    [{"do": "add", ...}, {"do": "add", ...}]

A list of changes is made as a whole or not at all.  An answer has `ok`, and `error` or what was asked for; `notes` are
lines for the user.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..config import ConfigError
from ..config.ports import OPTIONS, Rule, parse

LINE_MAX = 65536  # bytes
AT_ONCE_MAX = 8  # requests that a client sends before it reads an answer


class Forwarding(Protocol):
    """What is controlled."""

    def change(self, changes: Sequence[tuple[bool, Rule]]) -> list[str]:
        """Add these rules (True) and remove those, all or none; lines for the user.  Raises ConfigError."""


class Requests:
    """The session of a client; `show` gives the answer to that request."""

    patience = None
    alone = 0.0

    def __init__(self, forwarding: Forwarding, show: Callable[[], dict[str, Any]]) -> None:
        self._forwarding = forwarding
        self._show = show
        self._held = b""

    def greeting(self) -> bytes:
        return b""

    def take(self, data: bytes) -> tuple[bytes, bool]:
        *lines, self._held = (self._held + data).split(b"\n")
        if len(lines) > AT_ONCE_MAX:
            return b"", False
        answers = [json.dumps(self._answer(line)).encode() + b"\n" for line in lines]
        return b"".join(answers), len(self._held) <= LINE_MAX

    def _answer(self, line: bytes) -> dict[str, Any]:
        """The answer to one request."""
        try:
            request = json.loads(line.decode())
            if isinstance(request, dict) and request["do"] == "show":
                return {"ok": True, **self._show()}
            changes = request if isinstance(request, list) else [request]
            notes = self._forwarding.change([change for each in changes for change in _changes(each)])
        except ConfigError as e:
            return {"ok": False, "error": str(e)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {"ok": False, "error": "not a request"}
        except OSError as e:
            return {"ok": False, "error": e.strerror or str(e)}
        return {"ok": True, "notes": notes} if notes else {"ok": True}


def _changes(request: Any) -> list[tuple[bool, Rule]]:
    """The changes of a request; raises ConfigError, or what a text that is not a request raises."""
    what = request["do"]
    if what not in ("add", "del"):
        raise ConfigError(f"unknown request '{what}'")
    option, text = str(request["option"]), str(request["ports"])
    if option in OPTIONS and text == "none":
        raise ConfigError(f"'{option} none' is no port to {what}")
    if option not in OPTIONS:
        raise ConfigError(f"one of -t, -u, -T and -U and ports are needed, not '{option} {text}'")
    return [(what == "add", rule) for rule in parse(option, *OPTIONS[option], text)]
