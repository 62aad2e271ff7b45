"""Namespaces: made or joined, with a tap in them whose descriptor comes back to us.

Owns the processes that it starts.  Imports config.py, device.py and addresses.py.

This process never leaves the host's namespaces.  Whatever has to be done in the guest's is done by a
child: for a command it is the first process of the new namespaces, which stays as their init; to join
an existing namespace it is a helper that ends when it is done.  Either sends the tap's descriptor over a
socket pair (SCM_RIGHTS), or one line that says what went wrong.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from ..config import Config, ConfigError
from . import addresses, device

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220}

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 2, 4, 8, 0x4000, 0x80000
PR_SET_PDEATHSIG = 1

IN_DELETE_SELF, IN_DELETE, IN_MOVED_FROM = 0x400, 0x200, 0x40
IN_CLOEXEC, IN_NONBLOCK = 0o2000000, 0o4000

HOSTNAME_MAX = 64
SHELLS = frozenset({"sh", "ash", "bash", "dash", "fish", "ksh", "mksh", "zsh"})
NETNS_DIRECTORY = "/run/netns"
MESSAGE_MAX = 65536

# PyDLL: a child made by clone() must not wait for an interpreter lock that the parent holds
_libc = ctypes.PyDLL(None, use_errno=True)


@dataclass(frozen=True)
class Guest:
    """A namespace with a tap in it, ready to be served."""

    tap_fd: int
    ifname: str
    vnet: bool
    tx_queue: int
    watch_fd: int  # readable when the namespace, or its command, may have gone away; -1: never
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


def start(config: Config, template: addresses.Template) -> Guest:
    """Make or join the namespace that the Config names; raises ConfigError."""
    if config.tap_fd is not None:
        tap = device.tap_from_fd(config.tap_fd, config.offload)
        return Guest(tap.fd, tap.name, tap.vnet, addresses.RING_FRAMES_DEFAULT, -1, None)
    if config.attach:
        return _join(config, template)
    return _spawn(config, template)


def _spawn(config: Config, template: addresses.Template) -> Guest:
    flags = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
    if not config.netns_only:
        flags |= CLONE_NEWUSER
    if config.pidns:
        flags |= CLONE_NEWPID
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    uid, gid, parent = os.geteuid(), os.getegid(), os.getpid()
    number = SYS_CLONE.get(platform.machine(), 120)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    pid = _libc.syscall(number, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        ours.close()
        _child(_init, config, template, theirs, uid, gid, parent)
    if pid < 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(f"cannot make namespaces: {reason}")
    theirs.close()
    tap, report = _receive(ours)
    return Guest(
        tap,
        report["name"],
        report["vnet"],
        report["tx_queue"],
        os.pidfd_open(pid),
        Command(pid, ours),
    )


def _receive(control: socket.socket) -> tuple[int, dict[str, Any]]:
    """What the child has to say: a tap, or a reason why there is none."""
    message, fds, _, _ = socket.recv_fds(control, MESSAGE_MAX, 1)
    if not message:
        raise ConfigError("the process in the namespace ended before the tap was ready")
    report = json.loads(message)
    if "error" in report:
        raise ConfigError(report["error"])
    return fds[0], report


def _child(main: Any, *args: Any) -> NoReturn:
    """Run `main` in a child; its ConfigErrors go to the parent, nothing returns from here."""
    control = next(arg for arg in args if isinstance(arg, socket.socket))
    status = 1
    try:
        status = main(*args)
    except ConfigError as e:
        control.send(json.dumps({"error": str(e)}).encode())
    except BaseException as e:
        control.send(json.dumps({"error": f"{type(e).__name__}: {e}"}).encode())
    finally:
        os._exit(status)


def _send_tap(control: socket.socket, config: Config, template: addresses.Template) -> None:
    """Open and configure the tap in the namespace we are in, and pass it to the parent."""
    addresses.bring_up_loopback()
    tap = device.open_tap(config.ifname, config.offload)
    addresses.configure(config, template, tap.name)
    report = {
        "name": tap.name,
        "vnet": tap.vnet,
        "tx_queue": addresses.queue_frames(tap.name),
    }
    socket.send_fds(control, [json.dumps(report).encode()], [tap.fd])
    os.close(tap.fd)


def _init(
    config: Config,
    template: addresses.Template,
    control: socket.socket,
    uid: int,
    gid: int,
    parent: int,
) -> int:
    """The first process of new namespaces: sets them up, runs the command, reaps what it leaves."""
    # While the command is held it must not outlive us
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not config.netns_only:
        _map_ids(uid, gid)
    _libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None)
    if config.pidns:
        _libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    with contextlib.suppress(OSError):
        socket.sethostname(f"pasta-{socket.gethostname()}"[:HOSTNAME_MAX])
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write("0 0")
    _send_tap(control, config, template)
    if control.recv(16) != b"go":
        return 1
    control.close()
    _libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    return _run_command(config.command)


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


def _run_command(command: tuple[str, ...]) -> int:
    """Run the command to its end; its exit status, 128 + n if signal n ended it.

    It is a child of init rather than init itself: the kernel keeps signals with default action from
    the first process of a PID namespace, and a program does not expect that.
    """
    program, argv = command[0] if command else "", list(command)
    if not command:
        program = os.environ.get("SHELL") or "/bin/sh"
        argv = [f"-{program}"]
    child = os.fork()
    if child == 0:
        if os.path.basename(program) in SHELLS and len(argv) == 1:
            _own_terminal()
        _exec(program, argv)
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


def _exec(program: str, argv: list[str]) -> NoReturn:
    # Python ignores these, and what is ignored stays so across exec
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(program, argv)
    except OSError as e:
        os.write(2, f"pysplice: cannot run {program}: {e.strerror}\n".encode())
    finally:
        os._exit(1)


# Joining


def _join(config: Config, template: addresses.Template) -> Guest:
    netns, userns = paths(config)
    net_fd = _open_namespace(netns)
    if os.path.samestat(os.fstat(net_fd), os.stat("/proc/self/ns/net")):
        # A tap in there would take over the routes that we need ourselves
        raise ConfigError(f"{netns} is the network namespace that we run in")
    user_fd = _open_namespace(userns) if userns else -1
    if user_fd >= 0 and os.path.samestat(os.fstat(user_fd), os.stat("/proc/self/ns/user")):
        os.close(user_fd)
        user_fd = -1
    watch = _watch(config, netns)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(_helper, config, template, theirs, net_fd, user_fd)
    theirs.close()
    try:
        tap, report = _receive(ours)
    finally:
        os.waitpid(pid, 0)
        ours.close()
        os.close(net_fd)
        if user_fd >= 0:
            os.close(user_fd)
    return Guest(tap, report["name"], report["vnet"], report["tx_queue"], watch, None)


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


def _helper(
    config: Config,
    template: addresses.Template,
    control: socket.socket,
    net_fd: int,
    user_fd: int,
) -> int:
    """Open the tap in the namespace that is joined."""
    if user_fd >= 0:
        _call(f"join the user namespace {paths(config)[1]}", _libc.setns(user_fd, CLONE_NEWUSER))
    _call(f"join the network namespace {paths(config)[0]}", _libc.setns(net_fd, CLONE_NEWNET))
    _send_tap(control, config, template)
    return 0


# The end of a namespace


def _watch(config: Config, netns: str) -> int:
    """A descriptor that becomes readable when the namespace may have gone away; -1: never.

    A process is watched by its pidfd; a file (a bind mount, or a link in a directory) by inotify on
    its directory, because the file itself belongs to nsfs, which reports nothing.
    """
    if config.pid is not None:
        try:
            return os.pidfd_open(config.pid)
        except OSError as e:
            raise ConfigError(f"cannot watch process {config.pid}: {e.strerror}") from None
    if not config.netns_quit:
        return -1
    parts = os.path.abspath(netns).split("/")
    if parts[1:2] == ["proc"] and len(parts) > 2:
        if not parts[2].isdigit():
            return -1  # our own, by way of /proc/self
        try:
            return os.pidfd_open(int(parts[2]))
        except OSError as e:
            raise ConfigError(f"cannot watch process {parts[2]}: {e.strerror}") from None
    fd = _libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
    directory = os.path.dirname(os.path.abspath(netns)).encode()
    mask = IN_DELETE | IN_MOVED_FROM | IN_DELETE_SELF
    _call("watch the namespace", _libc.inotify_add_watch(fd, directory, mask))
    return int(fd)


def gone(config: Config, watch_fd: int) -> bool:
    """True if what `watch_fd` reported is the end of the namespace that was joined."""
    if config.pid is not None:
        return True
    try:
        os.read(watch_fd, MESSAGE_MAX)
    except OSError as e:
        # Anything else: a pidfd, whose process has ended
        return e.errno != errno.EAGAIN
    return not os.path.exists(paths(config)[0])
