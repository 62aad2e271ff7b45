"""`pysplice ctl PATH ...`: sends requests to a process that runs with --control PATH, and prints the answers.

Owns nothing.  Imports `config`, `observe` and tables.py.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..config.ports import OPTIONS, SPELLED, UNIX
from ..observe.log import print_text
from .tables import MAGIC, printable

TIMEOUT = 10.0  # seconds
ANSWER_MAX = 16 << 20  # bytes
RECEIVE_MAX = 1 << 16

Request = dict[str, str] | list[dict[str, str]]  # see requests.py

USAGE = """\
Usage: pysplice ctl PATH show [--json]
       pysplice ctl PATH add [-t|-u|-T|-U PORTS]...
       pysplice ctl PATH del [-t|-u|-T|-U PORTS]...

Show or change the forwarded ports of a pysplice that was started with --control PATH.  PORTS is written as
for the option, and del takes a part of a range too.  show lists rules, listeners and connections, and updates
by pesto that were refused.
"""


def main(words: Sequence[str]) -> int:
    """Run the words after `ctl`; the exit status."""
    words = list(words)
    if words[-1:] in (["-h"], ["--help"]):
        return print_text(USAGE)
    request, problem = _request(words)
    if problem:
        return _fail(f"{problem}; see pysplice ctl --help")
    try:
        answer = ask(words[0], request)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or os.strerror(errno.EIO)
        return _fail(f"cannot ask {words[0]}: {reason}{_hint(words[0], e)}")
    if answer.get("ok") is not True:
        return _fail(printable(str(answer.get("error"))))
    for note in answer.get("notes", ()):
        sys.stderr.write(f"pysplice: {printable(str(note))}\n")
    if "--json" in words:
        return print_text(json.dumps(answer, indent=2) + "\n", "pysplice")
    return print_text(_text(answer), "pysplice")


def _fail(problem: str) -> int:
    sys.stderr.write(f"pysplice: {problem}\n")
    return 1


def _request(words: list[str]) -> tuple[Request, str]:
    """The request of a command line, or what is wrong with it."""
    if not words:
        return [], "ctl needs the PATH of a control socket, and show, add or del"
    if len(words) == 1:
        return [], f"ctl {words[0]} needs show, add or del after the path"
    what, rest = words[1], words[2:]
    if what == "show":
        words = [word for word in rest if word != "--json"]
        return (
            ({"do": "show"}, "") if not words else ([], f"show takes --json only, not '{' '.join(words)}'")
        )
    if what not in ("add", "del"):
        return [], f"ctl takes show, add or del, not '{what}'"
    if not rest:
        return [], f"{what} needs an option and ports, as in: {what} -t 8080:80"
    changes = []
    while rest:
        name, given, value = rest.pop(0).partition("=")
        option = SPELLED.get(name, name)
        if option not in OPTIONS or (given and name not in SPELLED):
            return [], f"{what} needs one of -t, -u, -T and -U before '{name}{given}{value}'"
        if given:
            rest.insert(0, value)
        if not rest:
            return [], f"{option} needs ports, as in: {what} {option} 8080:80"
        changes.append({"do": what, "option": option, "ports": _absolute(rest.pop(0))})
    return changes, ""


def _hint(path: str, error: Exception) -> str:
    """What may have caused a failure to reach the socket."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return "; it is not a socket"
    if isinstance(error, ConnectionRefusedError):
        return "; the process that had this socket has ended"
    if isinstance(error, FileNotFoundError):
        return "; start pysplice with --control and this path"
    if isinstance(error, PermissionError):
        return "; only the user who started pysplice, and root, may use it"
    return ""


def _text(answer: dict[str, Any]) -> str:
    """An answer, as it is printed."""
    lines = []
    for name, label in (
        ("rules", "rule"),
        ("listening", "listening"),
        ("connections", "connection"),
        ("refused", "refused"),
    ):
        lines += [f"{label} {line}" for line in answer.get(name, ())]
    if "counts" in answer:
        lines.append(str(answer["counts"]))
    return "".join(f"{printable(line)}\n" for line in lines)


def _absolute(ports: str) -> str:
    """Ports with the path of a UNIX socket made absolute: the serving process has another working directory."""
    if not ports.startswith(UNIX):
        return ports
    path, colon, port = ports[len(UNIX) :].rpartition(":")
    return f"{UNIX}{os.path.abspath(path)}{colon}{port}" if path else ports


def _line(sock: socket.socket) -> bytes:
    """The line that comes, or as much of it as there is room for; raises TimeoutError if all of it takes too long."""
    found, until = bytearray(), time.monotonic() + TIMEOUT
    while len(found) < ANSWER_MAX and not found.endswith(b"\n"):
        sock.settimeout(max(until - time.monotonic(), 0.001))
        data = sock.recv(RECEIVE_MAX)
        if not data:
            break
        found += data
    return bytes(found)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def ask(path: str, request: Request) -> dict[str, Any]:
    """The answer to a request; raises OSError or ValueError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        sock.sendall(json.dumps(request).encode() + b"\n")
        line = _line(sock) or b'{"error": "no answer"}'
    if line.startswith(MAGIC):
        raise ValueError("it is the socket of -c, for pesto; pysplice ctl takes that of --control")
    try:
        answer = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        answer = None
    lists = ("notes", "rules", "listening", "connections", "refused")
    if not isinstance(answer, dict) or not all(isinstance(answer.get(name, []), list) for name in lists):
        raise ValueError("not an answer")
    return answer
