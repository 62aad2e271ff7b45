"""The init of new namespaces, and the command in them.

Owns the process that it starts.  Imports `config` and the files of this room.

The init is the first process of the namespaces.  It sets them up, holds the command until it is released, runs it, and
reaps the processes that the command leaves behind.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
from typing import NoReturn

from ..config import Command, Config, ConfigError
from . import children, files, libc, privileges, seccomp

HOSTNAME_MAX = 64
SHELLS = frozenset({"sh", "ash", "bash", "dash", "fish", "ksh", "mksh", "zsh"})
RESOLV_CONF = "/etc/resolv.conf"
RELEASE_MAX = 65536

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell has them

USERNS_MAX_PATH = "/proc/sys/user/max_user_namespaces"
APPARMOR_PATH = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"


class Init:
    """The init, as its parent sees it."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self._control = control

    def release(self, resolv_conf: str = "") -> None:
        """Have the command run; with the text of a resolv.conf(5) it gets that as /etc/resolv.conf."""
        # If the init is gone, wait() will say so
        with contextlib.suppress(OSError):
            self._control.send(b"go" + resolv_conf.encode()[: RELEASE_MAX - 2])
        self._control.close()

    def wait(self) -> int:
        """The exit status of the command, 128 + n if signal n ended it."""
        _, status = os.waitpid(self.pid, 0)
        return _exit_status(status)


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def spawn(config: Config, target: Command) -> Init:
    """Make new namespaces with an init in them; raises ConfigError."""
    flags = libc.CLONE_NEWNET | libc.CLONE_NEWNS | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS
    if target.user_namespace:
        flags |= libc.CLONE_NEWUSER
    if config.pidns:
        flags |= libc.CLONE_NEWPID
    ours, theirs = children.pair()
    uid, gid = os.geteuid(), os.getegid()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        pid = libc.clone(flags | signal.SIGCHLD)
    except OSError as e:
        raise ConfigError(
            f"cannot make namespaces: {e.strerror}{_why(e.errno or 0, target.user_namespace)}"
        ) from None
    if pid == 0:
        ours.close()
        children.run(_main, theirs, config, target, uid, gid)
    theirs.close()
    children.receive(ours)
    return Init(pid, ours)


def _why(error: int, user_namespace: bool) -> str:
    """What may have caused a failure to make namespaces."""
    if error == errno.EPERM and not user_namespace:
        return "; without a user namespace (--netns-only) this requires privileges"
    if error == errno.ENOSPC:
        return f"; no user namespace may be made, see user.max_user_namespaces ({USERNS_MAX_PATH})"
    if error == errno.EPERM:
        return "; the system does not let users make namespaces" + (
            " (kernel.apparmor_restrict_unprivileged_userns)" if os.path.exists(APPARMOR_PATH) else ""
        )
    return ""


def _main(control: socket.socket, config: Config, target: Command, uid: int, gid: int) -> int:
    """The init."""
    # The guest gets no descriptor of ours
    files.close_but(control.fileno())
    # While the command is held, it must not outlive the process that serves
    libc.prctl("follow the parent", libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if target.user_namespace:
        # A process that has changed its user is hidden, and then its map files belong to root
        privileges.hide(False)
        map_ids(f"0 {uid} 1", f"0 {gid} 1")
        # Become what the maps say this process is, for all programs that ask
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    with contextlib.suppress(ConfigError):
        libc.mount("keep mounts apart", "none", "/", "", libc.MS_REC | libc.MS_SLAVE)
    if config.pidns:
        flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
        with contextlib.suppress(ConfigError):
            libc.mount("mount proc", "proc", "/proc", "proc", flags)
    with contextlib.suppress(OSError):
        socket.sethostname((config.hostname or f"pasta-{socket.gethostname()}")[:HOSTNAME_MAX])
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write("0 0")
    children.report(control, {})
    released = control.recv(RELEASE_MAX)
    if released[:2] != b"go":
        return 1
    control.close()
    libc.prctl("outlive the parent", libc.PR_SET_PDEATHSIG, 0)
    name = "pasta" if config.as_pasta else "pysplice"
    if released[2:]:
        try:
            _replace_resolv_conf(released[2:])
        except (ConfigError, OSError) as e:
            os.write(2, f"{name}: no {RESOLV_CONF} of the namespace's own: {e}\n".encode())
    if _has_terminal():
        seccomp.protect_terminal()
    if config.new_session:
        os.setsid()
    return _run(target, name, config.as_pasta)


def map_ids(uid_map: str, gid_map: str) -> None:
    """Write the maps of this process's new user namespace (user_namespaces(7)); raises ConfigError."""
    for name, text in (("setgroups", "deny"), ("uid_map", uid_map), ("gid_map", gid_map)):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as e:
            raise ConfigError(f"cannot write {name}: {e.strerror}") from None


def _replace_resolv_conf(text: bytes) -> None:
    """Mount a file with this text over /etc/resolv.conf, in this mount namespace; raises ConfigError or OSError."""
    target = os.path.realpath(RESOLV_CONF, strict=True)
    # The file is in a file system that is mounted only for a moment; it survives, because by then it is mounted
    # elsewhere
    place = "/tmp"
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    libc.mount("mount a file system", "none", place, "tmpfs", flags, "size=128k,mode=755")
    try:
        path = f"{place}/resolv.conf"
        with open(path, "wb") as file:
            file.write(text)
        os.chmod(path, 0o644)
        libc.mount(f"mount over {target}", path, target, "", libc.MS_BIND)
    finally:
        libc.umount("unmount it", place, libc.MNT_DETACH)


def _has_terminal() -> bool:
    """True if the command can reach a terminal that other processes use too."""
    if any(os.isatty(fd) for fd in range(3)):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _run(target: Command, name: str, as_pasta: bool) -> int:
    """Run the command to its end; its exit status.

    The command is a child of the init rather than the init itself: the kernel shields the first process of a PID
    namespace from signals whose action is the default, and programs do not expect that.
    """
    program, argv = target.argv[0] if target.argv else "", list(target.argv)
    if not target.argv:
        program = os.environ.get("SHELL") or "/bin/sh"
        argv = [f"-{program}"]
    child = os.fork()
    if child == 0:
        if os.path.basename(program) in SHELLS and len(argv) == 1:
            _own_terminal()
        _exec(program, argv, name, as_pasta)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pid, status = os.wait()
        if pid == child:
            return _exit_status(status)


def _own_terminal() -> None:
    """Make this process the leader of the terminal's foreground group, if it has a terminal.

    The group that it is in has no number in a new PID namespace, and a shell that gives the terminal back to it when
    it exits (dash) takes that for an error.
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


def _exec(program: str, argv: list[str], name: str, as_pasta: bool) -> NoReturn:
    """Become the program; exits with 127 or 126 if that fails, and with 1 when called pasta."""
    # Python ignores these signals, and what is ignored stays so across exec
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    status = 1
    try:
        os.execv(_find(program), argv)
    except OSError as e:
        hint = "; options go before the PID" if program.isdigit() else ""
        if program == "ctl":
            hint = "; ctl is the first word, before any option"
        os.write(2, f"{name}: cannot run '{program}': {e.strerror}{hint}\n".encode())
        if not as_pasta:
            status = NOT_FOUND if isinstance(e, FileNotFoundError) else NOT_EXECUTABLE
    except Exception as e:
        os.write(2, f"{name}: cannot run '{program}': {type(e).__name__}: {e}\n".encode())
    finally:
        os._exit(status)


def _find(program: str) -> str:
    """The path of a program (PATH); raises OSError.  A directory that cannot be read counts as empty."""
    if "/" in program:
        return program
    refused = ""
    # os.get_exec_path() imports a module, which this user may not be able to read
    path = os.environ.get("PATH", os.defpath)
    for directory in path.split(os.pathsep) if program else ():
        found = os.path.join(directory, program)
        if os.access(found, os.X_OK) and not os.path.isdir(found):
            return found
        if os.path.isfile(found):
            refused = found
    if refused:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
