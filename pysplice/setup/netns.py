"""Namespaces: made or joined, with a tap in them whose descriptor comes back to us.

Owns the processes that it starts.  Imports the other files of this room, config.py and `inside`.

This process never leaves the host's namespaces.  Whatever has to be done in the guest's is done by children:
- a command has an init, the first process of the new namespaces, which holds it until it is let go;
- a helper looks at the host's addresses, joins the namespace, makes the tap and configures it, and ends; it
  sends what it has found and the tap's descriptor over a socket pair (SCM_RIGHTS), or one line that says what
  went wrong.  netlink is imported there alone, while this process imports the rest;
- an agent stays in the namespace and makes sockets there (inside.py).
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .. import inside
from ..config import Config, ConfigError
from . import isolation, sandbox, seccomp
from .sandbox import CLONE_NEWIPC, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWUTS
from .template import Template

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CLONE_NEWNET = 0x40000000

SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220}

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 2, 4, 8, 0x4000, 0x80000
PR_SET_PDEATHSIG = 1

IN_DELETE_SELF, IN_DELETE, IN_MOVED_FROM = 0x400, 0x200, 0x40
IN_CLOEXEC, IN_NONBLOCK = 0o2000000, 0o4000

INOTIFY_EVENT = struct.Struct("iIII")  # struct inotify_event, without its name

HOSTNAME_MAX = 64
SHELLS = frozenset({"sh", "ash", "bash", "dash", "fish", "ksh", "mksh", "zsh"})
NETNS_DIRECTORY = "/run/netns"
IFNAME_DEFAULT = "tap0"
MESSAGE_MAX = 65536
LENGTH = struct.Struct("=I")

# PyDLL: a child made by clone() must not wait for an interpreter lock that the parent holds
_libc = ctypes.PyDLL(None, use_errno=True)


class Guest(NamedTuple):
    """A namespace with a tap in it, ready to be served."""

    tap_fd: int  # -1: there is none
    ifname: str
    vnet: bool
    uso: bool  # the tap takes UDP segmentation offload
    tx_queue: int
    mac: bytes  # of the tap in the namespace; empty: not known
    template: Template
    agent: socket.socket | None
    watch: "Watch"  # of the namespace, or of its command
    command: "Command | None"


def _call(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            raise ConfigError(f"cannot {what}: it is none")
        raise ConfigError(f"cannot {what}: {os.strerror(number)}")
    return result


# The command


class Command:
    """The init of new namespaces, which holds the command until it is let go."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self._control = control

    def let_go(self) -> None:
        """Run the command: everything it needs is there."""
        # If its init is gone, wait() will say so
        with contextlib.suppress(OSError):
            self._control.send(b"go")
        self._control.close()

    def wait(self) -> int:
        """The exit status of the command, 128 + n if signal n ended it."""
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


class Starting:
    """What start() has begun; finish() waits for it."""

    def __init__(
        self,
        control: socket.socket,
        agent: socket.socket | None,
        helper: int,
        watch: "Watch",
        command: "Command | None",
        tap_fd: int,
    ) -> None:
        self._control = control
        self._agent = agent
        self._helper = helper
        self._watch = watch
        self._command = command
        self._tap_fd = tap_fd

    def finish(self) -> Guest:
        """The namespace, configured; raises ConfigError."""
        try:
            fds, report = _receive(self._control)
        finally:
            os.waitpid(self._helper, 0)
            self._control.close()
        return Guest(
            fds[0] if fds else self._tap_fd,
            report["name"],
            report["vnet"],
            report["uso"],
            report["tx_queue"],
            bytes.fromhex(report["mac"]),
            Template.from_words(report["template"]),
            self._agent,
            self._watch,
            self._command,
        )


def start(config: Config, agent: bool) -> Starting:
    """Make or join the namespace that the Config names; raises ConfigError.

    With `agent` there will be a process in it that makes sockets.
    """
    command, watch, net_fd, user_fd = None, Watch(), -1, -1
    if config.tap_fd is None and not config.attach:
        command = _spawn(config)
        watch = Watch(os.pidfd_open(command.pid))
        net_fd = _open_namespace(f"/proc/{command.pid}/ns/net")
        user_fd = -1 if config.netns_only else _open_namespace(f"/proc/{command.pid}/ns/user")
    elif config.tap_fd is None:
        net_fd, user_fd, watch = _namespaces(config)
    control, helper = fork(_helper, config, net_fd, user_fd)
    server = fork(_agent, net_fd, user_fd)[0] if agent and net_fd >= 0 else None
    for fd in (net_fd, user_fd):
        if fd >= 0:
            os.close(fd)
    return Starting(
        control, server, helper, watch, command, config.tap_fd if config.tap_fd is not None else -1
    )


def fork(main: "Callable[..., int]", *args: Any) -> tuple[socket.socket, int]:
    """A child that runs `main` with its end of a socket pair first; our end, and its process ID."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(main, theirs, *args)
    theirs.close()
    return ours, pid


def _spawn(config: Config) -> Command:
    flags = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
    if not config.netns_only:
        flags |= CLONE_NEWUSER
    if config.pidns:
        flags |= CLONE_NEWPID
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    uid, gid, parent = os.geteuid(), os.getegid(), os.getpid()
    number = SYS_CLONE.get(os.uname().machine, 120)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    pid = _libc.syscall(number, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        ours.close()
        _child(_init, theirs, config, uid, gid, parent)
    if pid < 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(f"cannot make namespaces: {reason}")
    theirs.close()
    _receive(ours)
    return Command(pid, ours)


def _receive(control: socket.socket) -> tuple[list[int], dict[str, Any]]:
    """What a child has to say, with descriptors; its one line of failure becomes ours."""
    # In two: what a host has is as long as it is, and descriptors need a byte to go with
    length, fds, _, _ = socket.recv_fds(control, LENGTH.size, 1)
    if len(length) < LENGTH.size:
        raise ConfigError("the process in the namespace ended before all was ready")
    left, parts = LENGTH.unpack(length)[0], []
    while left:
        part = control.recv(MESSAGE_MAX)
        if not part:
            raise ConfigError("the process in the namespace ended before all was ready")
        parts.append(part)
        left -= len(part)
    report = json.loads(b"".join(parts))
    if "error" in report:
        raise ConfigError(report["error"])
    return fds, report


def _report(control: socket.socket, report: dict[str, Any], fds: "Sequence[int]" = ()) -> None:
    """What _receive() takes."""
    text = json.dumps(report).encode()
    socket.send_fds(control, [LENGTH.pack(len(text))], fds)
    for at in range(0, len(text), MESSAGE_MAX):
        control.send(text[at : at + MESSAGE_MAX])


def _child(main: "Callable[..., int]", control: socket.socket, *args: Any) -> NoReturn:
    """Run `main` in a child; its ConfigErrors go to the parent, nothing returns from here."""
    status = 1
    try:
        status = main(control, *args)
    except ConfigError as e:
        _report(control, {"error": str(e)})
    except BaseException as e:
        _report(control, {"error": f"{type(e).__name__}: {e}"})
    finally:
        os._exit(status)


def _init(control: socket.socket, config: Config, uid: int, gid: int, parent: int) -> int:
    """The first process of new namespaces: sets them up, runs the command, reaps what it leaves."""
    # Nothing that the guest runs has a descriptor of ours
    isolation.close_but(control.fileno())
    # While the command is held it must not outlive us
    _prctl("follow the parent", PR_SET_PDEATHSIG, signal.SIGKILL)
    if not config.netns_only:
        # What changed its user is hidden, and the files of its maps are root's then
        isolation.hide(False)
        _map_ids(uid, gid)
    _libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None)
    if config.pidns:
        _libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    with contextlib.suppress(OSError):
        socket.sethostname((config.hostname or f"pasta-{socket.gethostname()}")[:HOSTNAME_MAX])
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write("0 0")
    _report(control, {})
    if control.recv(16) != b"go":
        return 1
    control.close()
    _prctl("outlive the parent", PR_SET_PDEATHSIG, 0)
    if _has_terminal():
        seccomp.protect_terminal()
    if config.new_session:
        os.setsid()
    return _run_command(config)


def _prctl(what: str, option: int, value: int) -> None:
    isolation.call(what, _libc.prctl(option, value, 0, 0, 0))


def _has_terminal() -> bool:
    """True if the command can reach a terminal that others use too."""
    if any(os.isatty(fd) for fd in range(3)):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _map_ids(uid: int, gid: int) -> None:
    """Ours become root's, alone (user_namespaces(7))."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as e:
            raise ConfigError(f"cannot write {name}: {e.strerror}") from None
    # What the map says we are, for everything that looks
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _run_command(config: Config) -> int:
    """Run the command to its end; its exit status, 128 + n if signal n ended it.

    It is a child of init rather than init itself: the kernel keeps signals with default action from
    the first process of a PID namespace, and a program does not expect that.
    """
    command = config.command
    program, argv = command[0] if command else "", list(command)
    if not command:
        program = os.environ.get("SHELL") or "/bin/sh"
        argv = [f"-{program}"]
    child = os.fork()
    if child == 0:
        if os.path.basename(program) in SHELLS and len(argv) == 1:
            _own_terminal()
        _exec(program, argv, "pasta" if config.as_pasta else "pysplice")
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _own_terminal() -> None:
    """Make this process the leader of the terminal's foreground group, if we have a terminal.

    The group that it is in has no number in a new PID namespace, and a shell that wants to give the
    terminal back to it when it ends (dash) takes that for an error.
    """
    try:
        if os.tcgetpgrp(0) != os.getpgrp():
            return
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.tcsetpgrp(0, os.getpgrp())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    except OSError:
        return


def _exec(program: str, argv: list[str], name: str) -> NoReturn:
    # Python ignores these, and what is ignored stays so across exec
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        if not program:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        os.execvp(program, argv)
    except OSError as e:
        os.write(2, f"{name}: cannot run '{program}': {e.strerror}\n".encode())
    finally:
        os._exit(1)


# Joining


def _namespaces(config: Config) -> "tuple[int, int, Watch]":
    """The network and user namespace to join (the latter -1 if none), and what to watch."""
    netns, userns = paths(config)
    net_fd = _open_namespace(netns)
    if os.path.samestat(os.fstat(net_fd), os.stat("/proc/self/ns/net")):
        # A tap in there would take over the routes that we need ourselves
        raise ConfigError(f"{netns} is the network namespace that we run in")
    user_fd = _open_namespace(userns) if userns else -1
    if user_fd >= 0 and os.path.samestat(os.fstat(user_fd), os.stat("/proc/self/ns/user")):
        os.close(user_fd)
        user_fd = -1
    return net_fd, user_fd, _watch(config, netns)


def paths(config: Config) -> tuple[str, str]:
    """The files of the network and user namespaces to join; the latter may be empty."""
    if config.pid is not None:
        user = "" if config.netns_only else config.userns or f"/proc/{config.pid}/ns/user"
        return f"/proc/{config.pid}/ns/net", user
    name = config.netns or ""
    return name if "/" in name else f"{NETNS_DIRECTORY}/{name}", config.userns or ""


def _open_namespace(path: str) -> int:
    if path.startswith("/proc/") and not os.path.exists(path.rsplit("/ns/", 1)[0]):
        raise ConfigError(f"there is no process {path.split('/')[2]}")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise ConfigError(f"cannot open the namespace {path}: {e.strerror}") from None


def _enter(net_fd: int, user_fd: int, names: tuple[str, str] = ("", "")) -> None:
    """Join a network and a user namespace; `names` of their files are for messages."""
    # With the privileges of a namespace above, root's of the guest has no power over this process
    if user_fd >= 0 and not isolation.may_mount():
        _call(f"join the user namespace {names[1]}".rstrip(), _libc.setns(user_fd, CLONE_NEWUSER))
        isolation.hide()  # with other credentials it may be visible again
    _call(f"join the network namespace {names[0]}".rstrip(), _libc.setns(net_fd, CLONE_NEWNET))


def _helper(control: socket.socket, config: Config, net_fd: int, user_fd: int) -> int:
    """What the guest is to have, read off the host; then a tap in the namespace, and all of it on the tap."""
    from . import addresses, device

    isolation.hide()
    tap_fd = config.tap_fd if config.tap_fd is not None else -1
    isolation.close_but(control.fileno(), net_fd, user_fd, tap_fd)
    template = addresses.read(config)
    report: dict[str, Any] = {
        "name": "", "vnet": False, "uso": False, "mac": "", "tx_queue": addresses.RING_FRAMES_DEFAULT,
        "template": template.to_words(),
    }  # fmt: skip
    fds = []
    if net_fd < 0:
        tap = device.tap_from_fd(config.tap_fd or 0, config.offload)
        report |= {"name": tap.name, "vnet": tap.vnet, "uso": tap.uso}
    else:
        _enter(net_fd, user_fd, paths(config) if config.attach else ("", ""))
        addresses.bring_up_loopback()
        if not config.splice_only:
            ifname = config.ifname or (config.as_pasta and template.interface) or IFNAME_DEFAULT
            tap = device.open_tap(ifname, config.offload)
            tx_queue, mac = addresses.configure(config, template, tap.name)
            report |= {"name": tap.name, "vnet": tap.vnet, "uso": tap.uso}
            report |= {"tx_queue": tx_queue, "mac": mac.hex()}
            fds = [tap.fd]
    _report(control, report, fds)
    return 0


def _agent(control: socket.socket, net_fd: int, user_fd: int) -> int:
    """Make sockets in the namespace, until the other end of `control` is closed."""
    # A terminal's signals are for others, and whoever reads our output must not wait for this process
    os.setsid()
    isolation.leave_terminal(isolation.open_null())
    isolation.hide()
    isolation.close_but(control.fileno(), net_fd, user_fd)
    _enter(net_fd, user_fd)
    isolation.close_but(control.fileno())
    sandbox.enter(sandbox.INSIDE)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    inside.serve(control)
    return 0


# The end of a namespace


class Watch:
    """How the end of a namespace is noticed.

    `fd`: readable when it may have gone away, -1: there is nothing of the kind.  `gone()` tells whether it has;
    with `polled` it has to be asked now and then.
    """

    def __init__(self, fd: int = -1, name: bytes = b"", polled: "_Polled | None" = None) -> None:
        self.fd = fd
        self._name = name
        self.polled = polled

    def gone(self) -> bool:
        """True if the namespace that was joined is no more."""
        if self.polled is not None:
            return self.polled.gone()
        if not self._name:
            return self.fd >= 0  # a process
        try:
            events = os.read(self.fd, MESSAGE_MAX)
        except OSError:
            return False
        at = 0
        while at < len(events):
            _, mask, _, length = INOTIFY_EVENT.unpack_from(events, at)
            at += INOTIFY_EVENT.size
            # By name: whether the file is there we may not be allowed to see any more
            if mask & IN_DELETE_SELF or events[at : at + length].rstrip(b"\0") == self._name:
                return True
            at += length
        return False


class _Polled:
    """A file of a directory that is held open, as it was: for a user who has no inotify instance left."""

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


def _watch(config: Config, netns: str) -> Watch:
    """A process is watched by its pidfd.

    A file (a bind mount, or a link in a directory) is watched by inotify on its directory, because the file itself
    belongs to nsfs, which reports nothing.
    """
    if not config.netns_quit:
        return Watch()
    pid = config.pid
    path = os.path.abspath(netns)
    parts = path.split("/")
    if pid is None and parts[1:2] == ["proc"] and len(parts) > 2:
        if not parts[2].isdigit():
            return Watch()  # our own, by way of /proc/self
        pid = int(parts[2])
    if pid is not None:
        try:
            return Watch(os.pidfd_open(pid))
        except OSError as e:
            raise ConfigError(f"cannot watch process {pid}: {e.strerror}") from None
    fd = _libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
    mask = IN_DELETE | IN_MOVED_FROM | IN_DELETE_SELF
    if fd >= 0 and _libc.inotify_add_watch(fd, os.path.dirname(path).encode(), mask) >= 0:
        return Watch(fd, os.path.basename(path).encode())
    if fd >= 0:
        os.close(fd)
    try:
        return Watch(polled=_Polled(path))
    except OSError as e:
        raise ConfigError(f"cannot watch {path}: {e.strerror}") from None
