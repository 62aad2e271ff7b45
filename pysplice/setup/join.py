"""The namespace that is served, and the processes that prepare it.

Owns the processes that it starts.  Imports `config`, `sockets` and the files of this room.

The process that serves never leaves the host's namespaces.  Its children do what has to be done in the guest's:

- the init holds the command, where there is one (command.py);
- the helper looks at the host's addresses, joins the namespace, makes the tap and configures it, reports its findings
  and the tap's descriptor, or one line about what went wrong, and exits.  It alone imports the netlink library,
  while the process that serves imports everything else;
- the agent stays in the namespace and makes sockets there (sockets/guest.py).
"""

import fcntl
import os
import signal
import socket
from typing import Any, NamedTuple

from ..config import Command, Config, ConfigError, Descriptor, NamespaceFile, Process
from ..sockets import guest
from . import background, children, command, files, libc, privileges, sandbox, watch
from .template import Template

IFNAME_DEFAULT = "tap0"

NS_GET_USERNS = 0xB701  # ioctl_ns(2)


class Guest(NamedTuple):
    """A namespace with a tap in it, ready to be served.

    `tap_fd`: -1: there is no tap.  `vnet`: frames carry a virtio header; `uso`: it may ask for UDP segmentation.
    `tx_queue`: how many frames the tap's ring holds.  `mac`: of the tap in the namespace, empty if it is not known.
    `agent`: the connection to the process that makes sockets, or None.  `watch`: of the namespace or of the command's
    init; `init`: that init, or None.
    """

    tap_fd: int
    ifname: str
    vnet: bool
    uso: bool
    tx_queue: int
    mac: bytes
    template: Template
    agent: socket.socket | None
    watch: watch.Watch
    init: command.Init | None


class Starting(NamedTuple):
    """What start() has begun; finish() waits for it.  `net_fd`, `user_fd`: of the guest's namespaces, or -1."""

    control: socket.socket
    agent: socket.socket | None
    helper: int
    watch: watch.Watch
    init: command.Init | None
    tap_fd: int
    net_fd: int
    user_fd: int

    def close(self) -> None:
        """Close the descriptors of the namespaces."""
        for fd in (self.net_fd, self.user_fd):
            if fd >= 0:
                os.close(fd)

    def finish(self) -> Guest:
        """The namespace, configured; raises ConfigError."""
        try:
            fds, found = children.receive(self.control)
        finally:
            os.waitpid(self.helper, 0)
            self.control.close()
        return Guest(
            fds[0] if fds else self.tap_fd,
            found["name"],
            found["vnet"],
            found["uso"],
            found["tx_queue"],
            bytes.fromhex(found["mac"]),
            Template.from_json(found["template"]),
            self.agent,
            self.watch,
            self.init,
        )


def start(config: Config, with_agent: bool) -> Starting:
    """Make or join the namespace that is to be served; raises ConfigError.

    `with_agent`: there will be a process in it that makes sockets.
    """
    target, init, net_fd, user_fd = config.target, None, -1, -1
    watched: watch.Watch = watch.NoWatch()
    if isinstance(target, Command):
        init = command.spawn(config, target)
        watched = watch.ProcessWatch(init.pid)
        net_fd = _open_namespace(f"/proc/{init.pid}/ns/net")
        user_fd = _open_namespace(f"/proc/{init.pid}/ns/user") if target.user_namespace else -1
    elif not isinstance(target, Descriptor):
        net_fd, user_fd = _namespaces(target)
        watched = watch.of(config, target)
    control, helper = children.fork(_helper, config, net_fd, user_fd)
    agent = children.fork(_agent, net_fd, user_fd)[0] if with_agent and net_fd >= 0 else None
    return Starting(control, agent, helper, watched, init, config.tap_fd, net_fd, user_fd)


def _namespaces(target: Process | NamespaceFile) -> tuple[int, int]:
    """Descriptors of the network and the user namespace to join; the latter -1 if there is none to join."""
    net_fd = _open_namespace(target.netns)
    if os.path.samestat(os.fstat(net_fd), os.stat("/proc/self/ns/net")):
        # A tap in there would take over the routes that this process needs itself
        raise ConfigError(f"{target.netns} is the network namespace that this process runs in")
    user_fd = _open_namespace(target.userns) if target.userns else -1
    if isinstance(target, Process) and target.userns == f"/proc/{target.pid}/ns/user":
        # The process may have gone on to another user namespace, as bubblewrap's have
        owner = _owner(net_fd)
        if owner >= 0:
            os.close(user_fd)
            user_fd = owner
    if user_fd >= 0 and os.path.samestat(os.fstat(user_fd), os.stat("/proc/self/ns/user")):
        os.close(user_fd)
        user_fd = -1
    return net_fd, user_fd


def _owner(net_fd: int) -> int:
    """A descriptor of the user namespace that owns a network namespace; -1 if it is out of reach."""
    try:
        return fcntl.ioctl(net_fd, NS_GET_USERNS)
    except OSError:
        return -1


def _open_namespace(path: str) -> int:
    if path.startswith("/proc/") and not os.path.exists(path.rsplit("/ns/", 1)[0]):
        raise ConfigError(f"there is no process {path.split('/')[2]}")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        hint = ""
        if isinstance(e, PermissionError):
            was_root = os.geteuid() != 0 and privileges.may_mount()
            hint = "; --runas root lets root keep its access" if was_root else "; it is another user's"
        raise ConfigError(f"cannot open the namespace {path}: {e.strerror}{hint}") from None


def enter(net_fd: int, user_fd: int, target: Process | NamespaceFile | None = None) -> None:
    """Join a network and a user namespace; `target` has their names for messages.  Raises ConfigError."""
    netns, userns = (target.netns, target.userns) if target is not None else ("", "")
    # While this process has the privileges of a parent namespace, the guest's root has no power over it
    if user_fd >= 0 and not privileges.may_mount():
        libc.setns(f"join the user namespace {userns}".rstrip(), user_fd, libc.CLONE_NEWUSER)
        privileges.hide()  # with other credentials it may be visible again
    hint = "" if userns or user_fd >= 0 else "; be root, or name the user namespace that owns it (--userns)"
    libc.setns(f"join the network namespace {netns}".rstrip(), net_fd, libc.CLONE_NEWNET, hint)


def _helper(control: socket.socket, config: Config, net_fd: int, user_fd: int) -> int:
    """Find out what the guest is to have; then make a tap in the namespace, and configure it."""
    from . import addresses, device

    privileges.hide()
    files.close_but(control.fileno(), net_fd, user_fd, config.tap_fd)
    template = addresses.read(config)
    found: dict[str, Any] = {
        "name": "", "vnet": False, "uso": False, "mac": "", "tx_queue": addresses.RING_FRAMES_DEFAULT,
        "template": template.to_json(),
    }  # fmt: skip
    fds = []
    if net_fd < 0:
        tap = device.tap_from_fd(config.tap_fd, config.offload)
        found |= {"name": tap.name, "vnet": tap.vnet, "uso": tap.uso}
    else:
        target = config.target
        enter(net_fd, user_fd, target if isinstance(target, (Process, NamespaceFile)) else None)
        addresses.bring_up_loopback()
        if not config.splice_only:
            ifname = config.ifname or (config.as_pasta and template.interface) or IFNAME_DEFAULT
            tap = device.open_tap(ifname, config.offload)
            tx_queue, mac = addresses.configure(config, template, tap.name)
            found |= {"name": tap.name, "vnet": tap.vnet, "uso": tap.uso}
            found |= {"tx_queue": tx_queue, "mac": mac.hex()}
            fds = [tap.fd]
    children.report(control, found, fds)
    return 0


def _agent(control: socket.socket, net_fd: int, user_fd: int) -> int:
    """Make sockets in the namespace until the other end of `control` is closed."""
    # Signals of the terminal are for other processes, and a reader of our output must not wait for this one
    os.setsid()
    background.leave_terminal(background.open_null())
    privileges.hide()
    files.close_but(control.fileno(), net_fd, user_fd)
    enter(net_fd, user_fd)
    files.close_but(control.fileno())
    sandbox.enter(sandbox.AGENT)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    guest.serve(control)
    return 0
