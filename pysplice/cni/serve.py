"""Begins and ends the process that serves an attachment.

Owns nothing.  Imports the other files of this room but the commands.
"""

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

from .attachment import (
    attached,
    control_path,
    end,
    identify,
    lock_path,
    note_path,
    serves,
    users_noted,
    users_of,
)
from .options import options_of
from .request import INVALID, IO_FAILURE, NOT_STARTED, Attachment, Failure, Request
from .result import result_of

START_TIMEOUT = 30.0  # seconds


def add(request: Request) -> dict[str, Any]:
    """Serve an attachment, if it is not served; the result.  Raises Failure."""
    attachment = request.attachment
    identity = identify(request.netns)
    if request.conf.get("prevResult"):
        raise Failure(INVALID, "this plugin is the first of a list: it takes no prevResult")
    options = options_of(request)
    users = users_of(request.conf)
    if attached(attachment) == identity and serves(attachment):
        return result_of(request)
    end(attachment, users)
    # First of all, so that GC finds whatever is begun
    try:
        with open(note_path(attachment), "w", encoding="utf-8") as file:
            noted = {"netns": request.netns, "identity": identity, "users": sorted(users)}
            json.dump(attachment._asdict() | noted, file)
    except OSError as e:
        raise Failure(IO_FAILURE, f"cannot write {note_path(attachment)}: {e.strerror}") from None
    try:
        _start(request, options)
        return result_of(request)
    except BaseException:
        delete(attachment, request.conf)
        raise


def _start(request: Request, options: list[str]) -> None:
    """Start the process that serves; raises Failure."""
    words = [
        *_program(), "--quiet", "--config-net", "--tap", request.attachment.ifname, *options,
        "--control", control_path(request.attachment), "--netns", request.netns,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CNI_")}
    try:
        result = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_TIMEOUT, check=False,
            env=environment, cwd="/", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failure(NOT_STARTED, "pysplice did not start in time") from None
    except OSError as e:
        raise Failure(NOT_STARTED, f"cannot start pysplice: {e.strerror}") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line and "started as root" not in line]
        lines = lines or [f"status {result.returncode}, without a reason"]
        raise Failure(NOT_STARTED, lines[-1].removeprefix("pysplice: "))


def _program() -> list[str]:
    """The command `pysplice`: the script beside this one, because a security module knows a program by its path.

    Where another user could have put it there, the interpreter starts the package instead.
    """
    folder = os.path.dirname(os.path.realpath(sys.argv[0]))
    script = f"{folder}/pysplice"
    if os.path.isfile(sys.argv[0]) and os.access(script, os.X_OK) and _is_ours(folder) and _is_ours(script):
        return [script]
    return [sys.executable, "-m", "pysplice"]


def _is_ours(path: str) -> bool:
    """True for what only this user and root can write."""
    found = os.stat(path)
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def delete(attachment: Attachment, conf: dict[str, Any]) -> None:
    """End what serves an attachment; it is no error if nothing does, or if the network's user is gone by now."""
    users = {os.geteuid(), *users_noted(attachment)}
    with contextlib.suppress(Failure):
        users |= users_of(conf)
    end(attachment, users)
    for path in (note_path(attachment), control_path(attachment), lock_path(attachment)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
