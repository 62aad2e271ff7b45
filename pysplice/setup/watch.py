"""Notices when a namespace ends.

Owns a descriptor.  Imports `config` and libc.py.
"""

import os
import struct
from typing import Protocol

from ..config import Config, ConfigError, NamespaceFile, Process
from . import libc

INOTIFY_EVENT = struct.Struct("iIII")  # struct inotify_event, without its name
EVENTS_MAX = 65536


class Watch(Protocol):
    """`fd` is readable when the namespace may have gone away; -1: ask gone() now and then if `polled`, else never."""

    fd: int
    polled: bool

    def gone(self) -> bool:
        """True if the namespace has gone away."""


class NoWatch:
    """Nothing reports when the namespace goes away, or nothing should."""

    fd = -1
    polled = False

    def gone(self) -> bool:
        return False


class ProcessWatch:
    """A process, by its pidfd."""

    polled = False

    def __init__(self, pid: int) -> None:
        try:
            self.fd = os.pidfd_open(pid)
        except OSError as e:
            raise ConfigError(f"cannot watch process {pid}: {e.strerror}") from None

    def gone(self) -> bool:
        return True


class FileWatch:
    """A file, by inotify on its directory: the file itself belongs to nsfs, which reports nothing."""

    polled = False

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self._name = name.encode()

    def gone(self) -> bool:
        try:
            events = os.read(self.fd, EVENTS_MAX)
        except OSError:
            return False
        at = 0
        while at < len(events):
            _, mask, _, length = INOTIFY_EVENT.unpack_from(events, at)
            at += INOTIFY_EVENT.size
            # By name: by now this process may not be allowed to look at the file any more
            if mask & libc.IN_DELETE_SELF or events[at : at + length].rstrip(b"\0") == self._name:
                return True
            at += length
        return False


class PolledFile:
    """A file of a directory that is held open: for a user who has no inotify instance left."""

    fd = -1
    polled = True

    def __init__(self, path: str) -> None:
        self._directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._name = os.path.basename(path)
        self._identity = self._look()

    def _look(self) -> tuple[int, int]:
        found = os.stat(self._name, dir_fd=self._directory)
        return found.st_dev, found.st_ino

    def gone(self) -> bool:
        try:
            return self._look() != self._identity
        except FileNotFoundError:
            return True
        except OSError:
            return False


def of(config: Config, target: Process | NamespaceFile) -> Watch:
    """How the end of the namespace that is joined is noticed; raises ConfigError."""
    if not config.netns_quit:
        return NoWatch()
    if isinstance(target, Process):
        return ProcessWatch(target.pid)
    path = os.path.abspath(target.netns)
    parts = path.split("/")
    if parts[1:2] == ["proc"] and len(parts) > 2:
        # /proc/self is this process's own
        return ProcessWatch(int(parts[2])) if parts[2].isdigit() else NoWatch()
    mask = libc.IN_DELETE | libc.IN_MOVED_FROM | libc.IN_DELETE_SELF
    fd = libc.inotify()
    if fd >= 0:
        if libc.inotify_add(fd, os.path.dirname(path), mask):
            return FileWatch(fd, os.path.basename(path))
        os.close(fd)
    try:
        return PolledFile(path)
    except OSError as e:
        raise ConfigError(f"cannot watch {path}: {e.strerror}") from None
