"""What is known of an attachment: its files, and the processes that serve it.

Owns the files of its folder, and ends processes.  Imports `config`, `control`, `setup` and request.py.
"""

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Collection, Iterator
from typing import Any

from ..config import ConfigError
from ..control import client
from ..setup import privileges
from .request import ENVIRONMENT, INVALID, IO_FAILURE, Attachment, Failure

STOP_TIMEOUT = 10.0  # seconds
CMDLINE_MAX = 65536


def state_folder() -> str:
    """The folder for sockets, locks and results, which is made if it is not there; raises Failure."""
    base = os.environ.get("PYSPLICE_CNI_STATE", "")
    if not base:
        # Root of a user namespace is an ordinary user on the host
        runtime = os.environ.get("XDG_RUNTIME_DIR", "") if not privileges.is_root() else ""
        base = f"{runtime or '/run'}/pysplice-cni"
    try:
        os.makedirs(base, 0o711, exist_ok=True)
        found = os.stat(base)
        if found.st_uid != os.geteuid():
            raise Failure(IO_FAILURE, f"{base} is another user's; set XDG_RUNTIME_DIR")
        if found.st_mode & 0o022:
            raise Failure(IO_FAILURE, f"others may write to {base}")
    except OSError as e:
        raise Failure(IO_FAILURE, f"cannot make {base}: {e.strerror}") from None
    return base


@contextlib.contextmanager
def locked(attachment: Attachment) -> Iterator[None]:
    """One request for an attachment at a time; raises Failure."""
    path = lock_path(attachment)
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise Failure(IO_FAILURE, f"cannot open {path}: {e.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_there(path, fd):
                yield
                return
        finally:
            os.close(fd)


def _is_there(path: str, fd: int) -> bool:
    """False if the one who had the lock has removed its file: then the lock is worth nothing."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def lock_path(attachment: Attachment) -> str:
    """The path of the lock."""
    return f"{state_folder()}/{attachment.name}.lock"


def control_path(attachment: Attachment) -> str:
    """The path of the control socket: what a process is found by."""
    return f"{state_folder()}/{attachment.name}.sock"


def note_path(attachment: Attachment) -> str:
    """The path of the file that says whose attachment this is, and of which namespace."""
    return f"{state_folder()}/{attachment.name}.json"


def attached(attachment: Attachment) -> object:
    """Which namespace was attached last, as identify() has it; None if that is not known."""
    return _noted(attachment).get("identity")


def users_noted(attachment: Attachment) -> frozenset[int]:
    """The users that the process of an attachment may run as, from the time when it was started."""
    users = _noted(attachment).get("users")
    return (
        frozenset(user for user in users if type(user) is int) if isinstance(users, list) else frozenset()
    )


def _noted(attachment: Attachment) -> dict[str, Any]:
    try:
        with open(note_path(attachment), encoding="utf-8") as file:
            noted = json.load(file)
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def identify(netns: str) -> list[int]:
    """Which namespace this is, whatever its path; raises Failure."""
    try:
        found = os.stat(netns)
    except OSError as e:
        raise Failure(ENVIRONMENT, f"CNI_NETNS: {netns}: {e.strerror}") from None
    return [found.st_dev, found.st_ino]


# Processes


def processes(attachment: Attachment, users: Collection[int]) -> list[int]:
    """The processes of these users that serve an attachment."""
    marker = control_path(attachment).encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        # What a process calls itself is its own choice, and may be of any length: so its user is looked at first
        with contextlib.suppress(OSError, ValueError):
            if _user(name) not in users:
                continue
            with open(f"/proc/{name}/cmdline", "rb", buffering=0) as file:
                words = file.read(CMDLINE_MAX).split(b"\0")
            if marker in words and words[words.index(marker) - 1] == b"--control":
                found.append(int(name))
    return found


def _user(pid: str) -> int:
    """The real user of a process; raises OSError or ValueError."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Uid:"):
                return int(line.split()[1])
    raise ValueError


def users_of(conf: dict[str, Any]) -> frozenset[int]:
    """The users that a pysplice of this network may run as: ours, and where we are root the one it changes to."""
    try:
        user = privileges.user_to_become(str(conf.get("runas") or ""))
    except ConfigError as e:
        raise Failure(INVALID, f"runas: {e}") from None
    return frozenset((os.geteuid(),) if user is None else (os.geteuid(), user[0]))


def serves(attachment: Attachment) -> bool:
    """True if a process answers at the control socket."""
    try:
        client.ask(control_path(attachment), {"do": "show"})
    except (OSError, ValueError):
        return False
    return True


def end(attachment: Attachment, users: Collection[int]) -> None:
    """End the processes of an attachment; raises Failure if they do not end."""
    until = time.monotonic() + STOP_TIMEOUT
    number = signal.SIGTERM
    while pids := processes(attachment, users):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                try:
                    os.kill(pid, number)
                except PermissionError:
                    raise Failure(IO_FAILURE, f"process {pid} is not ours to end") from None
        if time.monotonic() > until:
            if number == signal.SIGKILL:
                raise Failure(IO_FAILURE, f"process {pids[0]} does not end")
            number, until = signal.SIGKILL, time.monotonic() + STOP_TIMEOUT
        time.sleep(0.02)
