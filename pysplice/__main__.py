"""The command: argv -> Config -> set-up -> Proxy, and the exit status.

Imports `config`, `observe`, `setup`, `sockets` and, once they are needed, `assemble`, `control`, `loop`, `proxy` and
`tcp`.  Everything that can go wrong before the command starts ends here, in one line on stderr and exit
status 1.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from . import __version__
from .config import Config, ConfigError, NamespaceFile, Process, check, options
from .config.ports import Rule
from .observe.log import Clock, Log, LogFile, print_text
from .setup import files, privileges
from .sockets import unix

if TYPE_CHECKING:
    from .assemble import Found
    from .loop import BusyPoll, EventLoop
    from .proxy import Proxy
    from .setup.command import Init
    from .setup.join import Guest
    from .setup.names import Names


def main() -> NoReturn:
    """The command `pysplice`: exits with its status."""
    status = _main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            status = status or 1
    # Everything is closed and printed: tearing down the interpreter would only keep the caller waiting
    os._exit(status)


def _main() -> int:
    # Undo an inherited SIG_IGN on SIGCHLD: we reap our own children
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # SIGINT ends this process at once, as it ends pasta, unless the caller has it ignored
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Everything imported or made before we serve stays: looking for garbage in it costs a tenth of the start-up time
    gc.disable()
    called = os.path.basename(sys.argv[0])
    if called.startswith("pesto"):
        from .control import pesto

        return pesto.main(sys.argv[1:])
    as_pasta = called.startswith("pasta")
    name = "pasta" if as_pasta else "pysplice"
    if sys.argv[1:2] == ["ctl"] and not as_pasta:
        from .control import client

        return client.main(sys.argv[2:])
    try:
        config = options.parse(sys.argv[1:], as_pasta)
        rules = check.rules(config)
    except options.Usage as e:
        from .config import usage

        return print_text(usage.help_text(name) if e.what == "help" else _version(name))
    except ConfigError as e:
        sys.stderr.write(f"{name}: {e}\n")
        return 1
    clock = Clock(config.log_time)
    system = not config.log_file
    log = Log(config.quiet, config.debug, trace=config.trace, name=name, system=system, clock=clock)
    files.close_leaked(config.tap_fd)
    try:
        files.check_limit()
        if config.log_file:
            fd = files.open_output(config.log_file)
            try:
                log.file = LogFile(fd, config.log_size, f"{name} {__version__}", clock)
            except OSError as e:
                raise ConfigError(f"cannot write {config.log_file}: {e.strerror}") from None
        for warning in config.warnings:
            log.warning(warning)
        return run(config, rules, log)
    except Exception as e:
        log.error(str(e) if isinstance(e, ConfigError) else _described(e))
        return 1


def _version(name: str) -> str:
    """What --version prints; the first line begins as pasta's does when it is called by that name."""
    import importlib.metadata
    import platform

    from .tcp import connection

    called = "pasta (pysplice)" if name == "pasta" else "pysplice"
    lines = [f"{called} {__version__}", "Licence: GPL-2.0-or-later"]
    how = "pure Python" if connection.__file__.endswith(".py") else "compiled"
    parts = [how, f"{platform.python_implementation()} {platform.python_version()}"]
    for package in ("uvloop", "pyroute2", "pytun-pmd3"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{package} {importlib.metadata.version(package)}")
    parts.append(f"{platform.system()} {platform.release()} {platform.machine()}")
    return "\n".join([*lines, ", ".join(parts), ""])


def _described(error: Exception) -> str:
    """An unexpected error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"cannot start: {where}{error.strerror}"
    return f"cannot start: {type(error).__name__}: {error}".splitlines()[0]


def run(config: Config, rules: tuple[Rule, ...], log: Log) -> int:
    """Set everything up, and serve to the end; the exit status.  Raises ConfigError before the command starts."""
    from .setup import background, follow, join, names

    config, rules = _with_absolute_paths(config, rules)
    user = privileges.user_to_become(config.runas)
    if privileges.is_root():
        log.warning(_becoming(config, user))
    # Files are opened as the user who started this process; everything else is done as the user that it becomes
    owner = os.geteuid()
    pid_fd = files.open_pid_file(config.pid_file) if config.pid_file else -1
    trace_file = files.open_trace(config.trace_window) if config.trace_window else None
    pcap_fd = files.open_output(config.pcap) if config.pcap else -1
    socket_files = _socket_files(config, rules, owner, user)
    privileges.become(user)
    starting = join.start(config, check.needs_agent(config, rules))
    reports = None if config.splice_only else follow.start(config, starting.net_fd, starting.user_fd)

    # Imported while the helper is at work; --help and an error in the options need none of it
    from .assemble import Found, assemble, choose_names
    from .loop import EventLoop
    from .setup import interrupts, sandbox, seccomp  # noqa: F401

    guest = starting.finish()
    starting.close()
    host_names = names.read_host(config)
    if reports is not None:
        follow.begin(reports, guest.ifname, follow.State(host_names, guest.template))
    descriptors = files.raise_limit()
    in_background = config.attach and not config.foreground
    complaints: list[str] = []
    ready_fd, number = -1, os.getpid()
    if in_background:
        complaints.append(sandbox.leave_pid_namespace())
        ready_fd, number = background.to_background()
    known = choose_names(config, host_names, guest.template)
    _warn(config, guest, known, log)
    found = Found(guest, known, socket_files, descriptors, trace_file, pcap_fd, host_names, reports)
    privileges.renounce_new_privileges()
    with contextlib.suppress(ConfigError):
        seccomp.without_rings()
    loop = EventLoop(
        lambda error: log.defect(f"{type(error).__name__}: {error}", loop.now()), _busy_poll(config)
    )
    proxy = assemble(config, found, loop, log)
    proxy.follow(rules)
    # Everything that takes privileges, or has a path, is open by now
    null = background.open_null() if in_background else -1
    log.hold(number)
    complaints += sandbox.enter(sandbox.SERVE, chroot_fallback=config.chroot_fallback)
    for complaint in filter(None, complaints):
        # Without a system call filter a hostile guest has more to try: the user has to know
        (log.warning if "system calls" in complaint else log.debug)(complaint)
    if config.stats and not in_background:
        proxy.print_counts(config.stats)
    if pid_fd >= 0:
        files.write_pid_file(pid_fd, number)
    _summary(config, log, found, rules, number)

    log.serve()
    gc.freeze()
    gc.enable()
    if guest.init is not None:
        return _serve_command(config, proxy, found, guest.init, loop, log)

    def started() -> None:
        if in_background:
            background.leave_terminal(null)
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    return proxy.serve(guest.watch, lambda: 0, started)


def _busy_poll(config: Config) -> "BusyPoll | None":
    """How the loop polls before it sleeps; None: it does not."""
    from .loop import BUSY_POLL_AUTO, BusyPoll

    if config.busy_poll > 0:
        return BusyPoll(config.busy_poll)
    if config.busy_poll == 0 or len(os.sched_getaffinity(0)) == 1:
        # On one processor nothing can happen meanwhile
        return None
    return BusyPoll(BUSY_POLL_AUTO, adaptive=True)


def _with_absolute_paths(config: Config, rules: tuple[Rule, ...]) -> tuple[Config, tuple[Rule, ...]]:
    """The same with absolute paths: in the background the working directory is different."""
    target = config.target
    if isinstance(target, NamespaceFile) and "/" in target.name:
        config = config._replace(target=target._replace(name=os.path.abspath(target.name)))
    if config.control:
        config = config._replace(control=os.path.abspath(config.control))
    if config.conf_path:
        config = config._replace(conf_path=os.path.abspath(config.conf_path))
    return config, tuple(r._replace(path=os.path.abspath(r.path)) if r.path else r for r in rules)


def _becoming(config: Config, user: tuple[int, int] | None) -> str:
    """What root has to know when it starts this process."""
    if user is not None and user[0] != 0:
        return f"started as root: changing to {config.runas or 'nobody'}"
    return "--runas root: the command is root on the host, and so is this process"


def _warn(config: Config, guest: "Guest", known: "Names", log: Log) -> None:
    """Warn of what the host lacks, or of options that do not fit it."""
    ipv6 = guest.template.ipv6
    if config.ipv6_asked and ipv6 is not None and not ipv6.addresses:
        log.warning("no IPv6 on the host: the guest reaches the host's own services only")
    elif not known.found and not config.splice_only:
        log.warning("no name server found on the host")
    for version, name in ((4, config.outbound_if4), (6, config.outbound_if6)):
        if name:
            try:
                socket.if_nametoindex(name)
            except OSError:
                log.warning(f"--outbound-if{version} {name}: there is no such interface on the host now")


def _socket_files(
    config: Config, rules: tuple[Rule, ...], owner: int, user: tuple[int, int] | None
) -> unix.SocketFiles:
    """The keeper of UNIX sockets, if there are any or may be some later; raises ConfigError."""
    from .setup import background, children, sandbox

    wanted = {unix.REQUESTS: config.control, unix.UPDATES: config.conf_path}
    if not any(wanted.values()) and not any(rule.path for rule in rules):
        return unix.NoFiles()
    # Only the user who started this process may have sockets at any path
    paths = frozenset(rule.path for rule in rules if rule.path)
    allowed = paths if user is not None and user[0] != owner else None
    controls: dict[str, unix.UnixListener] = {}
    for name, path in wanted.items():
        try:
            controls |= {name: unix.listen(path)} if path else {}
        except OSError as e:
            for control in controls.values():
                control.unlink()
            raise ConfigError(f"cannot listen on {path}: {e.strerror or e}") from None

    def keep(alive: socket.socket) -> int:
        os.setsid()
        background.leave_terminal(background.open_null())
        files.close_but(alive.fileno(), *(control.sock.fileno() for control in controls.values()))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

        def confine() -> list[str]:
            return sandbox.enter(sandbox.KEEPER, empty=False)

        return unix.keep(alive, controls, owner, allowed, confine)

    ours, _ = children.fork(keep)
    for control in controls.values():
        control.sock.close()
    return unix.Keeper(ours)


def _serve_command(
    config: Config, proxy: "Proxy", found: "Found", init: "Init", loop: "EventLoop", log: Log
) -> int:
    """Run the command, and serve it; its exit status."""
    from .setup import interrupts  # run() has imported it: now there is no file to import from

    if not config.debug and not config.stats:
        log.silence()
    interrupted = interrupts.interrupt_fd()
    loop.watch(interrupted, lambda: interrupts.on_interrupt(interrupted))
    resolv_conf = found.names.resolv_conf(config.dns_forward) if config.resolv_conf else ""
    status = proxy.serve(found.guest.watch, init.wait, lambda: init.release(resolv_conf), has_command=True)
    if proxy.complaint and not config.debug:
        log.speak()
        log.warning(proxy.complaint)
    return status


def _summary(config: Config, log: Log, found: "Found", rules: tuple[Rule, ...], number: int) -> None:
    """Say what the guest got, where a user may want to know."""
    if config.attach and not (config.foreground or config.as_pasta):
        target = config.target
        served = f"process {target.pid}" if isinstance(target, Process) else "the namespace"
        log.info(f"serving {served} as process {number}")
    if not (config.debug or config.log_file or (config.attach and config.foreground)):
        return
    template = found.guest.template
    log.info(f"tap {found.guest.ifname}, MAC {':'.join(f'{byte:02x}' for byte in config.mac)}")
    for version, family in ((4, template.ipv4), (6, template.ipv6)):
        if family is not None:
            listed = " ".join(str(address) for address in family.addresses) or "no address"
            log.info(f"IPv{version}: {listed}, gateway {family.gateway or 'none'}")
    if found.names.servers:
        log.info(f"name servers: {' '.join(str(server) for server in found.names.servers)}")
    for rule in rules:
        log.info(f"{rule.protocol} of the {rule.side}: {rule}")


if __name__ == "__main__":
    main()
