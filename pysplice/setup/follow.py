"""The process that follows the host: its name servers, addresses and routes, as they change.

Owns an inotify instance and a socket of rtnetlink(7).  Imports `config` and the files of this room.

The process that serves has no file to open.  So this one, the follower, waits for changes, looks at what there is then,
and reports it; where the guest is to have the host's addresses, it also configures the tap, in a child that joins the
guest's namespace.  It reads nothing that the guest or the serving process can write.
"""

# system calls (follower): poll ppoll recvfrom sendto sendmsg socket bind getsockname getpeername ioctl fcntl
# system calls (follower): inotify_init1 inotify_add_watch clock_nanosleep openat open stat lstat statx readlink
# system calls (follower): readlinkat lseek getdents64 pread64 getcwd uname setsockopt
# system calls (configurator): poll ppoll recvfrom recvmsg sendto sendmsg socket socketpair bind getsockname getpeername
# system calls (configurator): ioctl fcntl inotify_init1 inotify_add_watch clock_nanosleep openat open stat lstat statx
# system calls (configurator): readlink readlinkat lseek getdents64 pread64 getcwd
# system calls (configurator): fork clone wait4 setns prctl capget capset set_robust_list rseq uname setsockopt

import contextlib
import json
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from ..config import Config, ConfigError
from . import background, children, files, join, libc, names, privileges, sandbox, seccomp
from .template import Template

# rtnetlink(7): links, and addresses and routes of both versions
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
EVENTS_BYTES = 65536
EVENT = struct.Struct("iIII")  # struct inotify_event, without its name
CHANGED = (
    libc.IN_CLOSE_WRITE
    | libc.IN_ATTRIB
    | libc.IN_CREATE
    | libc.IN_MOVED_TO
    | libc.IN_DELETE
    | libc.IN_MOVED_FROM
)
LINKS_MAX = 8
ADDRESSES_MAX = 64  # of each version, in a report
NOTE_MAX = 1000  # characters
REPORT_MAX = 65536

# A change is rarely alone: wait until nothing has happened for QUIET seconds, at most for PATIENCE; and spend no more
# than a BUSY-th of the time on looking (at most PAUSE_MAX seconds are waited), where routes change all the time.  What
# the guest could not be given is tried again after RETRY, and then ever less often.
QUIET, PATIENCE, BUSY, PAUSE_MAX = 0.2, 2.0, 20, 60.0
RETRY, RETRY_MAX = 10.0, 320.0
READS_MAX = 64  # of events, before it is quiet again or not


class State(NamedTuple):
    """What the host has: name servers and search domains, and what a guest would get."""

    names: names.HostNames
    template: Template


def report(state: State, note: str, guest: Template) -> bytes:
    """A message to the serving process, which needs no routes.

    `note`: why the guest could not be configured, or empty; `guest`: what it has.
    """
    fields = {
        "names": state.names.to_json(),
        "template": state.template.without_routes(ADDRESSES_MAX).to_json(),
        "guest": guest.without_routes(ADDRESSES_MAX).to_json(),
        "note": note[:NOTE_MAX],
    }
    return json.dumps(fields, ensure_ascii=False).encode()


def read_report(message: bytes) -> tuple[State, str, Template]:
    """The inverse of report()."""
    fields = json.loads(message)
    state = State(names.HostNames.from_json(fields["names"]), Template.from_json(fields["template"]))
    return state, str(fields["note"]), Template.from_json(fields["guest"])


def start(config: Config, net_fd: int, user_fd: int) -> socket.socket:
    """The follower; the socket that takes begin(), and then reports changes.

    `net_fd` and `user_fd`: of the guest's namespaces, -1 where there are none.
    """
    ours, _ = children.fork(_main, config, net_fd, user_fd)
    return ours


def begin(follower: socket.socket, ifname: str, state: State) -> None:
    """Have it report all changes from this state on; `ifname`: of the tap."""
    fields = {"ifname": ifname, "names": state.names.to_json(), "template": state.template.to_json()}
    children.report(follower, fields)


def _main(control: socket.socket, config: Config, net_fd: int, user_fd: int) -> int:
    """Report changes until the other end of `control` is closed."""
    os.setsid()
    background.leave_terminal(background.open_null())
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    files.close_but(control.fileno(), net_fd, user_fd)
    privileges.hide()
    try:
        _, fields = children.receive(control)
    except ConfigError:
        return 0  # nothing will be served
    template, ifname = Template.from_json(fields["template"]), fields["ifname"]
    versions = followed(config, template) if net_fd >= 0 else []
    host = _Host()
    if versions:
        # What joining a namespace and configuring it takes, where no user namespace gives it
        privileges.drop_privileges(libc.CAP_SYS_ADMIN, libc.CAP_NET_ADMIN)
        with contextlib.suppress(ConfigError):
            seccomp.confine(sandbox.CONFIGURATOR)
    else:
        for fd in filter(lambda fd: fd >= 0, (net_fd, user_fd)):
            os.close(fd)
        sandbox.enter(sandbox.FOLLOWER, empty=False)
    seen = State(names.HostNames.from_json(fields["names"]), template)
    told = template  # what the serving process knows that the guest has
    pause = RETRY
    wait = None  # until the next look, where nothing happens
    while host.wait(control, wait):
        from . import addresses

        began = time.process_time()
        now, notes, wait = host.look(config, seen), [], None
        for version in versions:
            before, after = template.family(version), now.template.family(version)
            if before is None or after is None or not after.online or before == after:
                continue
            note = _in_guest(net_fd, user_fd, partial(addresses.change, before, after, ifname))
            if note:
                notes.append(note)
            else:
                template = template.replaced(version, after)
        if notes:
            wait, pause = pause, min(2 * pause, RETRY_MAX)
        else:
            pause = RETRY
        if now != seen or template != told:
            try:
                control.send(report(now, "; ".join(notes), template))
            except OSError:
                break
            seen, told = now, template
        if host.is_gone(control, min((time.process_time() - began) * BUSY, PAUSE_MAX)):
            break
    return 0


def followed(config: Config, template: Template) -> list[int]:
    """The versions of IP whose addresses and routes the guest gets when the host's change.

    `template`: what the guest had at first.
    """
    families = ((4, template.ipv4), (6, template.ipv6))
    if not config.config_net or config.splice_only:
        return []
    return [version for version, family in families if family and (config.follow_host or not family.online)]


class _Host:
    """What reports changes, and how to look at them."""

    def __init__(self) -> None:
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        with contextlib.suppress(OSError):
            self._netlink.bind((0, GROUPS))
        self._inotify = -1
        self._names: set[bytes] = set()
        self._watch_names()

    def _watch_names(self) -> None:
        """Watch each directory on the way to resolv.conf, and the file: it may be bound there, and written in place."""
        if self._inotify >= 0:
            os.close(self._inotify)
        self._inotify = libc.inotify()
        self._names.clear()
        for path in _way(names.PATH):
            directory, name = os.path.split(path)
            while not os.path.isdir(directory):
                directory, name = os.path.split(directory)
            self._names.add(name.encode())
            libc.inotify_add(self._inotify, directory, CHANGED)
        libc.inotify_add(
            self._inotify, os.path.realpath(names.PATH), libc.IN_CLOSE_WRITE | libc.IN_DELETE_SELF
        )

    def is_gone(self, control: socket.socket, seconds: float) -> bool:
        """Wait so long; True once the other end of `control` is closed."""
        poll = select.poll()
        poll.register(control, 0)
        return bool(poll.poll(seconds * 1000))

    def wait(self, control: socket.socket, most: float | None) -> bool:
        """Wait for changes and then for quiet, or for `most` seconds; False once the other end is closed."""
        poll = select.poll()
        poll.register(control, 0)  # for its end alone
        poll.register(self._netlink, select.POLLIN)
        if self._inotify >= 0:
            poll.register(self._inotify, select.POLLIN)
        until: float | None = None
        while True:
            left = most if until is None else max(min(until - time.monotonic(), QUIET), 0)
            ready = [fd for fd, _ in poll.poll(None if left is None else left * 1000)]
            if control.fileno() in ready:
                return False
            if not ready and until is None:
                return True
            if self._drain(ready) and until is None:
                until = time.monotonic() + PATIENCE
            elif until is not None and (not ready or time.monotonic() >= until):
                return True

    def _drain(self, ready: list[int]) -> bool:
        """Read the events; True if one of them matters."""
        matters = False
        if self._netlink.fileno() in ready:
            matters = True
            # Where there are so many that some are lost (ENOBUFS), the rest is read next time
            with contextlib.suppress(OSError):
                for _ in range(READS_MAX):
                    self._netlink.recv(EVENTS_BYTES)
        if self._inotify in ready:
            with contextlib.suppress(OSError):
                for name in _events(os.read(self._inotify, EVENTS_BYTES)):
                    matters |= not name or name in self._names
        return matters

    def look(self, config: Config, before: State) -> State:
        """What there is now; addresses that cannot be read count as unchanged."""
        from . import addresses

        self._watch_names()
        template = before.template
        with contextlib.suppress(OSError, ConfigError):
            template = addresses.look(config)
        return State(names.read_host(config), template)


def _way(path: str) -> Iterator[str]:
    """The links on the way to a file, those of folders too, and the file in the end."""
    at, ahead, links = "/", deque(path.split("/")), 0
    while ahead and links <= LINKS_MAX:
        name = ahead.popleft()
        if name in ("", "."):
            continue
        here = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        try:
            target = os.readlink(here)
        except OSError:
            at = here
            continue
        yield here
        links += 1
        ahead.extendleft(reversed(target.split("/")))
        if target.startswith("/"):
            at = "/"
    yield at


def _events(data: bytes) -> Iterator[bytes]:
    """The names in events of inotify(7); empty for the watched file itself."""
    at = 0
    while at < len(data):
        length = EVENT.unpack_from(data, at)[3]
        at += EVENT.size
        yield data[at : at + length].rstrip(b"\0")
        at += length


def _in_guest(net_fd: int, user_fd: int, call: Callable[[], object]) -> str:
    """Make a call in a child that has joined the guest's namespaces; why that failed, empty if it did not."""

    def main(control: socket.socket) -> int:
        join.enter(net_fd, user_fd)
        call()
        children.report(control, {})
        return 0

    ours, pid = children.fork(main)
    try:
        children.receive(ours)
    except ConfigError as e:
        return str(e)
    finally:
        ours.close()
        os.waitpid(pid, 0)
    return ""
